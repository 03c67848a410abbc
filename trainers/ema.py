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
"""The moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerCallback

from .distributed import copy_of_weights, forget_gathered_weights


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the weights. After `n` optimizer steps the decay is
    `min(decay, (1 + n) / (10 + n))`, so that the start is forgotten quickly.

    Args:
        decay (`float`): The largest decay.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.averaged: AveragedModel | None = None
        self.is_applied = False

    @property
    def num_updates(self) -> int:
        """How many optimizer steps the average has seen."""
        # `AveragedModel` counts the initial copy as well.
        return int(self.averaged.n_averaged) - 1

    def start(self, model: PreTrainedModel, num_updates: int = 0):
        """Takes the weights of `model` for the average after `num_updates` steps."""
        weights = copy_of_weights(model)
        self.averaged = AveragedModel(weights, multi_avg_fn=self._average).requires_grad_(False)
        self.averaged.n_averaged.fill_(num_updates + 1)

    @torch.no_grad()
    def _average(self, averages: list[torch.Tensor], parameters: list[torch.Tensor], num_averaged: torch.Tensor):
        step = self.num_updates + 1
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + step) / (10 + step)))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.averaged is None:
            self.start(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averaged.update_parameters(model)

    @torch.no_grad()
    def _swap(self, model: PreTrainedModel):
        forget_gathered_weights(model)
        # In place, so that wrappers and compiled graphs that hold the parameters see the change.
        for parameter, average in zip(model.parameters(), self.averaged.module.parameters(), strict=True):
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
