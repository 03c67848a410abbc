# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights, which all models that are compared have."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

from modeling_flm.trainers.averaging import EMACallback


class AveragedTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that evaluates and saves, as [`~modeling_flm.trainers.FLMTrainer`] does, a moving average of the
    weights. Checkpoints have both, so that trainings go on as if they had not been interrupted.

    Args:
        ema_decay (`float`, *optional*): The decay of the average. `None` for none.
    """

    def __init__(self, *args, ema_decay: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # Each batch has a mean of its own, and accumulated ones are averaged.
        self.model_accepts_loss_kwargs = False
        self.ema = None if ema_decay is None else EMACallback(ema_decay)
        if self.ema is not None:
            self.add_callback(self.ema)

    def _averaged_weights(self) -> AbstractContextManager:
        return nullcontext() if self.ema is None else self.ema.applied(self.model)

    def evaluate(self, *args, **kwargs):
        with self._averaged_weights():
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        # A checkpoint keeps the weights of the training, and the average beside them.
        with nullcontext() if _internal_call else self._averaged_weights():
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.ema is not None:
            weights = {name: tensor.clone() for name, tensor in self.ema.averaged.state_dict().items()}
            save_file(weights, Path(output_dir, "ema.safetensors"), {"num_updates": str(self.ema.num_updates)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.ema is not None:
            path = Path(resume_from_checkpoint, "ema.safetensors")
            with safe_open(path, framework="pt") as file:
                self.ema.start(self.model, int(file.metadata()["num_updates"]))
            self.ema.averaged.load_state_dict(load_file(path))
