# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Data of the trainers: loading texts, packing them into blocks of tokens, collating and checking examples."""

from .checking import begins_with_bos_token, check_datasets, describe_dataset
from .collator import DataCollatorForFLM
from .loading import find_text_column, load_texts
from .packing import PREPROCESSING, detokenize_lm1b, pack_dataset, pack_tokens


__all__ = [
    "PREPROCESSING",
    "DataCollatorForFLM",
    "begins_with_bos_token",
    "check_datasets",
    "describe_dataset",
    "detokenize_lm1b",
    "find_text_column",
    "load_texts",
    "pack_dataset",
    "pack_tokens",
]
