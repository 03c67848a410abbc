# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""From examples to batches."""

from dataclasses import dataclass
from typing import Any

import torch


def check_tokens(name: str, input_ids: torch.LongTensor, vocab_size: int):
    """Raises a `ValueError` where there are tokens that a model does not have."""
    is_outside = (input_ids < 0) | (input_ids >= vocab_size)
    if is_outside.any():
        raise ValueError(
            f"{name} have the token {int(input_ids[is_outside][0])}, but the model's are 0 to {vocab_size - 1}: is it another's "
            "tokenizer? Build the model with `vocab_size=len(tokenizer)`."
        )


@dataclass
class DataCollatorForFLM:
    """
    Makes batches of examples with `input_ids`. Shorter examples are padded on the right; then there is an
    `attention_mask`, and `labels` are -100 where it is 0.

    Args:
        pad_token_id (`int`, *optional*): The token to pad with; any will do, as it is not attended to.
        vocab_size (`int`, *optional*): The size of the model's vocabulary, to refuse tokens that are not in it.
    """

    pad_token_id: int | None = None
    vocab_size: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for example in examples:
            if "input_ids" not in example:
                raise ValueError(
                    f"Examples need `input_ids`, and have {sorted(example)}: pack texts with `pack_dataset(dataset, tokenizer, "
                    "block_size=...)`."
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
            # Here, where it costs nothing: on a device it would be a failure of some later kernel.
            check_tokens("`input_ids`", batch["input_ids"], self.vocab_size)
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # nothing to mask: attention is faster without
        return batch
