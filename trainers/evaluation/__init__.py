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
"""Evaluation: texts that do not depend on who makes them, generative perplexity, and the whole measurement of a model."""

from .arguments import EvaluationArguments, check_arguments
from .evaluation import GenPPLEvaluation, decode
from .likelihood import evaluate_likelihood
from .metric import confidence_intervals, load_gen_ppl
from .report import describe_evaluation, describe_sampling, plot, table
from .samples import generate_samples


__all__ = [
    "EvaluationArguments",
    "GenPPLEvaluation",
    "check_arguments",
    "confidence_intervals",
    "decode",
    "describe_evaluation",
    "describe_sampling",
    "evaluate_likelihood",
    "generate_samples",
    "load_gen_ppl",
    "plot",
    "table",
]
