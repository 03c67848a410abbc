# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Data collator: from examples to batches."""

from dataclasses import dataclass
from typing import Any

import torch


def check_tokens(name: str, input_ids: torch.LongTensor, vocab_size: int):
    """Raises a `ValueError` for tokens outside of the model's vocabulary."""
    is_outside = (input_ids < 0) | (input_ids >= vocab_size)
    if is_outside.any():
        raise ValueError(
            f"{name} have the token {int(input_ids[is_outside][0])}, but the model's are 0 to {vocab_size - 1}. Does the tokenizer "
            "belong to a different model? Build the model with `vocab_size=len(tokenizer)`."
        )


@dataclass
class DataCollatorForFLM:
    """
    Data collator that makes batches of examples with `input_ids`. Shorter examples are padded on the right. The batch then has
    an `attention_mask`, and `labels` are -100 at padding, so that a model does not learn where texts end: [`pad_dataset`] makes
    examples that it learns this from.

    Args:
        pad_token_id (`int`, *optional*): Padding token. Any token will do, because it is not attended to.
        vocab_size (`int`, *optional*): Size of the model's vocabulary. Tokens outside of it raise an error.
    """

    pad_token_id: int | None = None
    vocab_size: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for example in examples:
            if "input_ids" not in example:
                raise ValueError(
                    f"Examples need `input_ids`, but have {sorted(example)}: make them with `pack_dataset` or "
                    "`pad_dataset`."
                )
        length = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": self.pad_token_id or 0, "attention_mask": 0, "labels": -100}
        columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in examples:
            ids = list(example["input_ids"])
            mask = list(example.get("attention_mask", [1] * len(ids)))
            labels = example.get("labels")
            if labels is None:
                labels = [token if real else -100 for token, real in zip(ids, mask)]
            for name, values in (("input_ids", ids), ("attention_mask", mask), ("labels", list(labels))):
                columns[name].append(values + [fills[name]] * (length - len(ids)))
        batch = {name: torch.tensor(rows) for name, rows in columns.items()}
        if self.vocab_size is not None:
            # On the host, where the check is cheap. On a device a later kernel would fail.
            check_tokens("`input_ids`", batch["input_ids"], self.vocab_size)
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # attention is faster without a mask
        return batch
