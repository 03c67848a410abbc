# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Resuming: which checkpoints are complete and have the model and tokenizer of the training, and a trainer that asks."""

import json
import math
import re
import zipfile
from collections.abc import Collection
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from modeling_flm.hub.records import TRAINING_NAME, to_json
from modeling_flm.utils_flm import describe_damage

from .adapters import has_added_adapters
from .pushing import PublishingTrainer


logger = logging.get_logger(__name__)

# Settings that change what weights of the same sizes mean
_SETTINGS = ("num_attention_heads", "attn_logit_softcapping", "final_logit_softcapping", "layer_norm_eps")
_SETTINGS += ("time_reparameterization", "rope_parameters", "per_token_timesteps", "max_position_embeddings")

# Recorded arguments that may change: the length of a training
_FREE = ("max_steps", "num_train_epochs")

# Patterns of files and folders. `Trainer` saves all of the training state, or none of it with `save_only_model`.
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*")
_TRAINING_STATE = ("optimizer*", "scheduler.pt", "rng_state*.pth")
_ZIP_FILES = ("*.pt", "*.pth", "optimizer.bin", "pytorch_model*.bin")


def describe_problem(checkpoint: str | Path) -> str | None:
    """Returns what a checkpoint lacks, or which of its files is damaged, or `None` if a training can resume from it."""
    folder = Path(checkpoint)
    missing = [] if (folder / TRAINER_STATE_NAME).is_file() else [TRAINER_STATE_NAME]
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        missing.append(SAFE_WEIGHTS_NAME)
    lacking = [pattern for pattern in _TRAINING_STATE if not any(folder.glob(pattern))]
    missing += lacking if len(lacking) < len(_TRAINING_STATE) else []
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and describe_damage(index) is None:
        shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        missing += sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        return f"{folder} is not a complete checkpoint: it lacks {', '.join(missing)}."
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        if (damage := describe_damage(path)) is not None:
            return damage
    for path, key in ((folder / TRAINER_STATE_NAME, "global_step"), (folder / TRAINING_NAME, "step")):
        content = json.loads(path.read_bytes()) if path.is_file() else {key: 0}
        if not isinstance(content, dict) or key not in content:
            return f"{path} is damaged: it has no {key}."
    damaged = [path for pattern in _ZIP_FILES for path in folder.glob(pattern) if not zipfile.is_zipfile(path)]
    return f"{damaged[0]} is truncated or damaged." if damaged else None


def find_checkpoint(output_dir: str | Path) -> str | None:
    """
    Returns the last complete checkpoint of a training, or `None` if there is no checkpoint. Warns about later ones.

    Args:
        output_dir (`str` or `Path`): The folder of the training.

    Raises:
        `ValueError`: if no checkpoint is complete.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    problems = []
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if (problem := describe_problem(folder)) is None:
            for each in problems:
                logger.warning(f"{each} The training resumes from {folder} instead.")
            return str(folder)
        problems.append(problem)
    if problems:
        raise ValueError(f"`resume_from_checkpoint`: {problems[0]} No earlier checkpoint is complete: start again.")
    return None


def check_resumable(checkpoint: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
    """
    Checks that a training can resume from a checkpoint.

    Args:
        checkpoint (`str` or `Path`): The folder of the checkpoint.
        model ([`~transformers.PreTrainedModel`]): The model to train.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer.

    Raises:
        `ValueError`: if the checkpoint is incomplete or damaged, or has weights of other sizes, other settings or another tokenizer.
    """
    if (problem := describe_problem(checkpoint)) is not None:
        raise ValueError(f"`resume_from_checkpoint`: {problem} Pass an earlier checkpoint.")
    weights = Path(checkpoint, SAFE_WEIGHTS_NAME)
    if weights.is_file() and isinstance(model, PreTrainedModel) and not has_added_adapters(model):
        with safe_open(weights, framework="pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if different := sorted(name for name in {*saved, *shapes} if saved.get(name) != shapes.get(name)):
            name = different[0]
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} has a model of another size ({name} is {saved.get(name)}, and "
                f"{shapes.get(name)} in the model to train). Pass the settings that it was trained with."
            )
    if Path(checkpoint, CONFIG_NAME).is_file() and isinstance(model, PreTrainedModel):
        config = AutoConfig.from_pretrained(checkpoint)
        saved, current = ({name: getattr(each, name, None) for name in _SETTINGS} for each in (config, model.config))
        if different := [name for name in _SETTINGS if saved[name] != current[name]]:
            name = different[0]
            raise ValueError(
                f"`resume_from_checkpoint`: the model of {checkpoint} has {name}={saved[name]}, and the model to train has "
                f"{current[name]}. Pass the settings that it was trained with."
            )
    if tokenizer is not None and Path(checkpoint, "tokenizer_config.json").is_file():
        if AutoTokenizer.from_pretrained(checkpoint).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"`resume_from_checkpoint`: the tokenizer of {checkpoint} has other tokens than the one that was passed, so the "
                "weights would mean something else. Load the tokenizer from the checkpoint."
            )


def check_same_run(checkpoint: str | Path, record: dict[str, Any]):
    """
    Warns if a training resumes with other arguments, texts or another teacher than its checkpoint had.

    Args:
        checkpoint (`str` or `Path`): The folder of the checkpoint.
        record (`dict[str, Any]`): The record of the training that resumes, [`~FLMTrainer.training_record`].

    Raises:
        `ValueError`: if it resumes with another optimizer, whose state means something else.
    """
    path = Path(checkpoint, TRAINING_NAME)
    if not path.is_file():
        return
    (saved, optim), (current, new_optim) = map(_flatten, (json.loads(path.read_bytes()), json.loads(to_json(record))))
    if optim not in (None, new_optim):
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} has the state of `optim` {optim}, got {new_optim}: pass the same, or start again "
            "from the model."
        )
    if changes := describe_changes(saved, current, _FREE):
        logger.warning(
            f"The training resumes from {checkpoint} with other settings, and differs from one without an interruption: "
            f"{', '.join(changes)}. "
            "Settings of the optimizer, such as the learning rate, stay as in the checkpoint; others apply from now on."
        )


def describe_changes(
    saved: dict[str, Any], current: dict[str, Any], free: Collection[str] = (), pattern: str = "{}"
) -> list[str]:
    """
    Lists the settings that differ between a training and its continuation.

    Args:
        saved (`dict[str, Any]`): The settings before.
        current (`dict[str, Any]`): The settings now.
        free (`Collection[str]`, *optional*): Names of settings that may change.
        pattern (`str`, *optional*, defaults to `"{}"`): How to write a name.

    Returns:
        `list[str]`: the changes, such as "seed from 0 to 1".
    """
    names = [name for name in {**saved, **current} if name not in free and saved.get(name) != current.get(name)]
    return [f"{pattern.format(name)} from {saved.get(name)} to {current.get(name)}" for name in names]


def _flatten(record: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Returns what the record of a training says about its arguments, texts and teacher by name, and its optimizer."""
    flat = {**record.get("arguments", {}), **record.get("data", {})}
    flat |= {name: record.get(name) for name in ("trainer", "teacher", "teacher_class")}
    return flat, flat.pop("optim", None)


class ResumableTrainer(PublishingTrainer):
    """Trainer that resumes from complete checkpoints only, and leaves a finished training as it is."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As [`~transformers.Trainer.train`]. `resume_from_checkpoint=True` resumes from the last complete checkpoint. A finished
        training is left as it is.

        Raises:
            `ValueError`: if the checkpoint is incomplete, damaged or of another model or tokenizer, or there is no batch to train on.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_checkpoint(self.args.output_dir) or True  # `Trainer` raises the error
        if isinstance(resume_from_checkpoint, str | PathLike):
            resume_from_checkpoint = fspath(resume_from_checkpoint)
            check_resumable(resume_from_checkpoint, self.model, self.processing_class)
            check_same_run(resume_from_checkpoint, self.training_record())
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if result.global_step == 0 < self.state.max_steps:
            raise ValueError(
                "Nothing was trained: there are fewer examples than a batch, which `dataloader_drop_last` drops. Leave it out, or "
                "pass a smaller `per_device_train_batch_size` or more texts."
            )
        return result

    def _init_training_state(self, *args):
        """Returns the number of epochs that a training has finished, and of batches since then."""
        progress, checkpoint = super()._init_training_state(*args), args[3]
        if checkpoint is None or has_length(self.train_dataset):
            return progress
        # `Trainer` takes a stream for one epoch of `max_steps`, and counts its batches as shares of that.
        saved = TrainerState.load_from_json(Path(checkpoint, TRAINER_STATE_NAME))
        epoch = max(math.ceil(saved.epoch or 0) - 1, 0)
        share = 0 if self.args.ignore_data_skip else (saved.epoch or 0) - epoch
        return epoch, round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *, epoch: int, epochs_trained: int, **kwargs):
        # `Trainer` would take one more step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        before = self.state.global_step
        super()._run_epoch(epoch=epoch, epochs_trained=epochs_trained, **kwargs)
        # A resumed epoch may have been at its end. Streams have any number of epochs.
        if epoch > epochs_trained and self.state.global_step == before and not self.control.should_training_stop:
            raise ValueError(
                "An epoch of the stream has fewer batches than `gradient_accumulation_steps`, so no step is taken: pass fewer."
            )

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.state.global_step >= self.state.max_steps:
            logger.warning(
                f"The training is finished: it has taken {self.state.global_step} steps, of {self.state.max_steps}. To go on, "
                "pass more `max_steps` or `num_train_epochs`."
            )
        return prepared
