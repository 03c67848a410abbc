# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Texts over HTTP, in the shape of OpenAI's completions: flow-based models, and any causal language model beside them.

    python examples/serve.py examples/models/words_fmlm
    python examples/serve.py outputs/quickstart/fmlm gpt2 --replicas 2 --max_batch_size 64 --port 8080

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "words_fmlm", "n": 4, "num_steps": 1, "seed": 0}'

Ray Serve runs the processes: one that answers HTTP, and `--replicas` of each model, which write the texts of concurrent requests
together. A model goes by the name of its folder, or on the Hub. docs/serving.md says more.
"""

import os


# Read where Ray is imported: nothing is reported to its makers, and a replica without a GPU keeps its environment.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


