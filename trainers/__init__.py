# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers of flow-based language models."""

from modeling_flm.tokenization_flm import add_special_tokens, train_tokenizer

from .averaging import AveragedTrainer, EMACallback
from .batches import FlowBatch, make_flow_batch
from .callbacks import GenPPLCallback, SampleCallback
from .data import (
    PREPROCESSING,
    DataCollatorForFLM,
    detokenize_lm1b,
    find_text_column,
    load_texts,
    longest_text,
    pack_dataset,
    pack_tokens,
    pad_dataset,
)
from .evaluation import generate_samples, load_gen_ppl
from .flm_config import FLMTrainingArguments
from .flm_trainer import FLMTrainer
from .fmlm_config import PRESETS, FMLMTrainingArguments
from .fmlm_trainer import FMLMTrainer
from .matching_trainer import DistributionMatchingTrainer


__all__ = [
    "PREPROCESSING",
    "AveragedTrainer",
    "DataCollatorForFLM",
    "DistributionMatchingTrainer",
    "EMACallback",
    "FLMTrainer",
    "FLMTrainingArguments",
    "FMLMTrainer",
    "FMLMTrainingArguments",
    "FlowBatch",
    "GenPPLCallback",
    "PRESETS",
    "SampleCallback",
    "add_special_tokens",
    "detokenize_lm1b",
    "find_text_column",
    "generate_samples",
    "load_gen_ppl",
    "load_texts",
    "longest_text",
    "make_flow_batch",
    "pack_dataset",
    "pack_tokens",
    "pad_dataset",
    "train_tokenizer",
]
