# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .distributed import copy_of_weights, forget_gathered_weights


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the weights. After `n` optimizer steps the decay is
    `min(decay, (1 + n) / (10 + n))`, so that the start is forgotten quickly. Weights that are not trained have none, such as
    those that adapters stand beside: `averaged` is the model with its averaged weights, and shares the others with it.

    Args:
        decay (`float`): The largest decay.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.averaged: nn.Module | None = None
        self.num_updates = 0  # the optimizer steps that the average has seen
        self.is_applied = False

    def start(self, model: PreTrainedModel, num_updates: int = 0):
        """Takes the weights of `model` for the average after `num_updates` steps."""
        self.averaged = copy_of_weights(model).requires_grad_(False)
        self.num_updates = num_updates

    def _pairs(self, model: PreTrainedModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The weights that have an average, each with it."""
        pairs = zip(model.parameters(), self.averaged.parameters(), strict=True)
        return [(parameter, average) for parameter, average in pairs if parameter is not average]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.averaged is None:
            self.start(model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if pairs := self._pairs(model):
            parameters, averages = map(list, zip(*pairs))
            torch._foreach_lerp_(averages, parameters, 1 - decay)

    @torch.no_grad()
    def _swap(self, model: PreTrainedModel):
        forget_gathered_weights(model)
        # In place, so that wrappers and compiled graphs that hold the parameters see the change.
        for parameter, average in self._pairs(model):
            value = parameter.clone()
            parameter.copy_(average)
            average.copy_(value)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Within this context `model` has the averaged weights."""
        if self.averaged is None or self.is_applied:
            yield
            return
        self._swap(model)
        self.is_applied = True
        try:
            yield
        finally:
            self.is_applied = False
            self._swap(model)
