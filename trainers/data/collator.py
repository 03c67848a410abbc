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
"""From examples to batches."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class DataCollatorForFLM:
    """
    Makes batches of examples with `input_ids`. Shorter examples are padded on the right; then there is an
    `attention_mask`, and `labels` are -100 where it is 0.

    Args:
        pad_token_id (`int`, *optional*): The token to pad with; any will do, as it is not attended to.
    """

    pad_token_id: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
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
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # nothing to mask: attention is faster without
        return batch
