# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Data of the trainers: loading texts, packing or padding them to sequences of tokens, collating and checking examples."""

from .checking import check_datasets, describe_dataset, find_text_boundaries
from .collator import DataCollatorForFLM
from .loading import find_text_column, load_texts
from .packing import PREPROCESSING, detokenize_lm1b, pack_dataset, pack_tokens
from .padding import longest_text, pad_dataset


__all__ = [
    "PREPROCESSING",
    "DataCollatorForFLM",
    "check_datasets",
    "describe_dataset",
    "detokenize_lm1b",
    "find_text_boundaries",
    "find_text_column",
    "load_texts",
    "longest_text",
    "pack_dataset",
    "pack_tokens",
    "pad_dataset",
]
