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
"""Trainers of flow-based language models."""

from modeling_flm.tokenization_flm import add_special_tokens, train_tokenizer

from .callbacks import GenPPLCallback, SampleCallback
from .data import (
    PREPROCESSING,
    DataCollatorForFLM,
    detokenize_lm1b,
    find_text_column,
    load_texts,
    pack_dataset,
    pack_tokens,
)
from .ema import EMACallback
from .evaluation import generate_samples, load_gen_ppl
from .flm_config import FLMTrainingArguments
from .flm_trainer import FLMTrainer
from .fmlm_config import PRESETS, FMLMTrainingArguments
from .fmlm_trainer import FMLMTrainer


__all__ = [
    "PREPROCESSING",
    "DataCollatorForFLM",
    "EMACallback",
    "FLMTrainer",
    "FLMTrainingArguments",
    "FMLMTrainer",
    "FMLMTrainingArguments",
    "GenPPLCallback",
    "PRESETS",
    "SampleCallback",
    "add_special_tokens",
    "detokenize_lm1b",
    "find_text_column",
    "generate_samples",
    "load_gen_ppl",
    "load_texts",
    "pack_dataset",
    "pack_tokens",
    "train_tokenizer",
]
