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
"""From texts to batches: loading, packing, collation."""

from .checking import check_dataset, check_length, describe_dataset
from .collator import DataCollatorForFLM
from .loading import find_text_column, load_texts
from .packing import PREPROCESSING, detokenize_lm1b, pack_dataset, pack_tokens


__all__ = [
    "PREPROCESSING",
    "DataCollatorForFLM",
    "check_dataset",
    "check_length",
    "describe_dataset",
    "detokenize_lm1b",
    "find_text_column",
    "load_texts",
    "pack_dataset",
    "pack_tokens",
]
