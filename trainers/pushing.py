# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Recording and publishing of a training: its record beside the saved model, the model card, and pushes to the Hub."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from modeling_flm.hub.publish import PublishError, assemble, publish
from modeling_flm.hub.records import TRAINING_NAME, to_json
from modeling_flm.utils_flm import use_default_mode

from .data import describe_dataset
from .distributed import restore_class_name


logger = logging.get_logger(__name__)

# `TrainingArguments` fields recorded in model cards, besides the length of the training and the fields of this library
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
_RECORDED_ADAM_ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon")

# Fields that are recorded where they differ from their default
_RECORDED_CHANGES = (
    *("lr_scheduler_kwargs", "optim_args", "optim_target_modules", "average_tokens_across_devices", "data_seed"),
    *("train_sampling_strategy", "length_column_name", "dataloader_drop_last"),
)


def record_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Returns the training arguments that a model card shows: recorded fields of transformers, and all of this library's."""
    inherited = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    own = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if field.name not in inherited and not field.name.startswith(("sample_", "eval_gen_ppl_"))
    }
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    names = (length, *_RECORDED_ARGUMENTS, *(_RECORDED_ADAM_ARGUMENTS if "adam" in args.optim else ()))
    arguments = {name: getattr(args, name) for name in names}
    arguments |= {name: getattr(args, name) for name in _RECORDED_CHANGES if getattr(args, name) != inherited[name]}
    return {**{name: getattr(value, "value", value) for name, value in arguments.items()}, **own}  # values of enums


class PublishingTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that saves a record of the training with the model, and publishes as
    [`~modeling_flm.hub.publish.publish`] does: with model code and card, and without `training_args.bin`, which has the token.
    """

    def training_record(self) -> dict[str, Any]:
        """Returns what a model card reports about the training."""
        return {
            "trainer": type(self).__name__,
            "step": self.state.global_step,
            "num_devices": self.args.world_size,
            "data": describe_dataset(self.train_dataset),
            "arguments": record_arguments(self.args),
        }

    def _save(self, output_dir: str | None = None, state_dict=None):
        restore_class_name(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir, TRAINING_NAME)
            path.write_text(to_json(self.training_record(), indent=2) + "\n", encoding="utf-8")
            use_default_mode(path.parent)  # adapters, which peft saves

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def create_model_card(self, model_name: str | None = None, **kwargs):
        """
        Saves the model, and its card as `README.md` in the same folder.

        Args:
            model_name (`str`, *optional*): Name of the repository. By default the name that `push_to_hub` uses.
            kwargs: Metadata of the card, see [`~modeling_flm.hub.card.build_card`].
        """
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            with tempfile.TemporaryDirectory() as folder:
                assemble(self.args.output_dir, Path(folder, "repository"), model_name or self._repo_id(), **kwargs)
                shutil.copy(Path(folder, "repository", "README.md"), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Saves the model and publishes it, see [`~modeling_flm.hub.publish.publish`]. Arguments default to `args.hub_token`,
        `args.hub_revision` and `args.hub_private_repo`; the repository is `args.hub_model_id`.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit message.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until the model is published.
            token (`str`, *optional*): A token with write access.
            revision (`str`, *optional*): Branch to commit to.
            private (`bool`, *optional*): Whether a new repository is private.
            kwargs: Metadata of the card, see [`~modeling_flm.hub.card.build_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`; `None` on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish(
            self.args.output_dir,
            self._repo_id(),
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
            token=token or self.args.hub_token,
            commit_message=commit_message,
            blocking=blocking,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # `Trainer` would upload all files of the output directory, without model code and with the token.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        settings = {
            "revision": self.args.hub_revision,
            "token": self.args.hub_token,
            "commit_message": f"Training in progress, step {self.state.global_step}",
        }
        private = self.args.hub_private_repo
        try:
            jobs = [publish(checkpoint_folder, self._repo_id(), private, blocking=False, check=False, **settings)]
        except PublishError as error:
            # A training goes on while the Hub is away.
            logger.warning(f"The checkpoint of step {self.state.global_step} is not pushed. {error}")
            return
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            upload = HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                ignore_patterns=["training_args.bin"],
                run_as_future=True,
                **settings,
            )
            jobs.append(upload)
        if is_pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
