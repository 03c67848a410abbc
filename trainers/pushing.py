# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer publishes: the record of a training, and checkpoints pushed to the Hub during it."""

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from modeling_flm.hub.publish import PublishError, publish

from .data import describe_dataset


logger = logging.get_logger(__name__)

# What a model card tells of transformers' own arguments, beside the length of the training and those of ours
_RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "optim",
    "weight_decay",
    "seed",
    "bf16",
    "fp16",
)
_RECORDED_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def training_record(
    trainer_name: str, args: TrainingArguments, global_step: int, train_dataset: Any
) -> dict[str, Any]:
    """What a model card tells of a training."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.name not in inherited and not field.name.startswith(("sample_", "eval_gen_ppl_"))
    }
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    names = (length, *_RECORDED_ARGUMENTS, *(_RECORDED_OF_ADAM if "adam" in args.optim else ()))
    arguments = {name: getattr(args, name) for name in names}
    arguments = {name: getattr(value, "value", value) for name, value in arguments.items()}  # of enumerations
    record = {"trainer": trainer_name, "step": global_step, "num_devices": args.world_size}
    return {**record, "data": describe_dataset(train_dataset), "arguments": {**arguments, **own}}


def repo_id(args: TrainingArguments) -> str:
    """The repository that a training is published in."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_checkpoint(folder: str, args: TrainingArguments, hub_model_id: str, global_step: int) -> list[Any]:
    """
    Starts to publish a checkpoint, and to upload the files for resuming if `args.hub_strategy` asks for that. Not as `Trainer`
    does it, which uploads whatever lies in the output directory, without code and with the token.

    Returns:
        `list`: the jobs that do it; none where the Hub does not answer, as a training does not end because the Hub is away.
    """
    settings = {
        "revision": args.hub_revision,
        "token": args.hub_token,
        "commit_message": f"Training in progress, step {global_step}",
    }
    try:
        jobs = [publish(folder, repo_id(args), args.hub_private_repo, blocking=False, check=False, **settings)]
    except PublishError as error:
        logger.warning(f"The checkpoint of step {global_step} is not pushed. {error}")
        return []
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        is_last = args.hub_strategy == HubStrategy.CHECKPOINT
        name = "last-checkpoint" if is_last else Path(folder).name
        upload = HfApi().upload_folder(
            repo_id=hub_model_id,
            folder_path=folder,
            path_in_repo=name,
            ignore_patterns=["training_args.bin"],
            run_as_future=True,
            **settings,
        )
        jobs.append(upload)
    return jobs
