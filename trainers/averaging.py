# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Moving average of the weights, and a trainer that evaluates, saves and resumes with it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from modeling_flm.utils_flm import use_default_mode

from .adapters import has_added_adapters, load_added_adapters
from .distributed import copy_of_weights, forget_gathered_weights, load_whole_state_dict, trained_state_dict


logger = logging.get_logger(__name__)

# Training weights in a checkpoint, which the optimizer continues from; `model.safetensors` or the adapter has the averaged ones.
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the trained weights. After `n` optimizer steps the decay is
    `min(decay, (1 + n) / (10 + n))`, so that the start is forgotten quickly. `averaged` is a copy of the model with the averaged
    weights; it shares the frozen weights, such as the base weights of adapters.

    Args:
        decay (`float`): Largest decay.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.averaged: nn.Module | None = None
        self.num_updates = 0  # optimizer steps
        self.is_applied = False

    def start(self, model: PreTrainedModel, num_updates: int = 0):
        """Starts the average from the weights of `model`, as the average after `num_updates` steps."""
        self.averaged = copy_of_weights(model).requires_grad_(False)
        self.num_updates = num_updates

    def _pairs(self, model: PreTrainedModel) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Returns the trained weights with their averages."""
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
        # In place, for wrappers and compiled graphs that hold the parameters.
        for parameter, average in self._pairs(model):
            value = parameter.clone()
            parameter.copy_(average)
            average.copy_(value)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Context in which `model` has the averaged weights."""
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


class AveragedTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that evaluates, predicts, saves and publishes the moving average of the weights. A checkpoint
    holds the averaged weights in `model.safetensors` and the training weights in `training_weights.safetensors`.

    Args:
        args: As for [`~transformers.Trainer`].
        ema ([`EMACallback`], *optional*): Callback that keeps the average. `None` disables it.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*): Further callbacks, which run after `ema`.
        kwargs: As for [`~transformers.Trainer`].
    """

    def __init__(
        self, *args, ema: EMACallback | None = None, callbacks: list[TrainerCallback] | None = None, **kwargs
    ):
        self.ema = ema
        super().__init__(*args, callbacks=[*([] if ema is None else [ema]), *(callbacks or [])], **kwargs)

    def call_model_init(self, trial=None):
        """As [`~transformers.Trainer.call_model_init`]. The new model gets a new average."""
        model = super().call_model_init(trial)
        if self.ema is not None:
            self.ema.averaged = None
        return model

    def _averaged_weights(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.applied(self.model)

    def evaluate(self, *args, **kwargs):
        """As [`~transformers.Trainer.evaluate`], with the averaged weights."""
        with self._averaged_weights():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As [`~transformers.Trainer.predict`], with the averaged weights."""
        with self._averaged_weights():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As [`~transformers.Trainer.save_model`], with the averaged weights."""
        with self._averaged_weights():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is None:
            return
        state_dict = trained_state_dict(self.model)  # on all processes, which may each have a shard
        if self.args.should_save:
            state_dict = {name: tensor.contiguous() for name, tensor in state_dict.items()}
            metadata = {"format": "pt", "ema_updates": str(self.ema.num_updates)}
            save_file(state_dict, Path(output_dir) / TRAINING_WEIGHTS_NAME, metadata=metadata)
            use_default_mode(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if has_added_adapters(self.model):
            load_added_adapters(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME
        if not path.is_file():
            if self.ema is not None:
                logger.warning(
                    f"{resume_from_checkpoint} has no {path.name}: the average starts from the weights of the model."
                )
            return
        if self.ema is not None:
            with safe_open(path, framework="pt") as file:
                num_updates = int(file.metadata()["ema_updates"])
            self._start_average(resume_from_checkpoint, num_updates)
        load_whole_state_dict(self.model, load_file(path))

    def _load_best_model(self):
        checkpoint = self.state.best_model_checkpoint
        # If the checkpoint is gone, `Trainer` only warns, and the average stays as it is.
        exists = Path(checkpoint).is_dir()
        if has_added_adapters(self.model) and exists:
            load_added_adapters(self.model, checkpoint)
        else:
            super()._load_best_model()
        if self.ema is not None and exists:
            self._start_average(checkpoint, self.ema.num_updates)

    def _start_average(self, checkpoint: str, num_updates: int):
        """Continues the average of a checkpoint that `Trainer` has loaded."""
        if self.is_fsdp_enabled:  # accelerate has loaded the training weights instead
            load_whole_state_dict(self.model, load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
        self.ema.start(self.model, num_updates)
