# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Mean losses over tokens and processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator


class TokenMeans:
    """
    Named mean losses. Every token of every process counts once.

    Args:
        names (`Sequence[str]`): Names of the means, the same on all processes.
        device (`torch.device`): Device of the sums. Only `pop` waits for it.
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
            losses (`torch.Tensor`): Losses, 0 where the mask is.
            mask (`torch.BoolTensor` of the shape of `losses`): Tokens that count.
        """
        self._totals[self.names.index(name)] += torch.stack([losses.sum(), mask.sum()]).to(self._totals)

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns the means over all processes since the last call, except names without tokens."""
        totals = accelerator.reduce(self._totals, "sum").tolist()
        self._totals = torch.zeros_like(self._totals)
        return {name: total / count for name, (total, count) in zip(self.names, totals) if count > 0}
