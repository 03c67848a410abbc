# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Means of losses over tokens, and over processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator


class TokenMeans:
    """
    Mean losses by name, in which every token of every process counts once.

    Args:
        names (`Sequence[str]`): The names, the same on all processes.
        device (`torch.device`): Where to add up: nothing waits for it before the means are asked for.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = list(names)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._totals = torch.zeros(len(self.names), 2, dtype=dtype, device=device)

    def add(self, name: str, losses: torch.Tensor, mask: torch.Tensor):
        """
        Adds the losses of some tokens.

        Args:
            name (`str`): One of the names.
            losses (`torch.Tensor`): The losses, 0 where they do not count.
            mask (`torch.BoolTensor` of the shape of `losses`): Which of them count.
        """
        self._totals[self.names.index(name)] += torch.stack([losses.sum(), mask.sum()]).to(self._totals)

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call, for those names of which any token was seen."""
        totals = accelerator.reduce(self._totals, "sum").tolist()
        self._totals = torch.zeros_like(self._totals)
        return {name: total / count for name, (total, count) in zip(self.names, totals) if count > 0}
