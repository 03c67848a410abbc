# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What `flm-train` and `flm-distill` share: loading models and data, and running a trainer."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import cached_file, logging

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.hub.loading import load_checked
from modeling_flm.hub.records import DATA_SETTINGS_NAME, to_json
from modeling_flm.tokenization_flm import add_special_tokens, has_characters_only
from modeling_flm.utils_flm import describe_damage

from ..data import PREPROCESSING, load_texts, pack_dataset, pad_dataset
from ..flm_config import FLMTrainingArguments, check_numbers
from ..flm_trainer import FLMTrainer
from ..resuming import describe_changes, describe_problem, find_checkpoint
from .command_line import check_model, check_model_type, errors_about, friendly_errors, with_flags


logger = logging.get_logger(__name__)

# Further settings of a dataset on the Hub
_DATASET_SETTINGS = ("dataset_name", "dataset_config_name", "dataset_revision", "train_split", "validation_split")


@dataclass
class DataArguments:
    """The texts to train on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub, or a folder with one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on, or a part of it such as train[:-1000]."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, or a part of it. By default validation, if it exists."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A txt, json, jsonl, csv, tsv or parquet file to train on, also compressed, or a folder. Replaces the dataset of a YAML file."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "A file or folder to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training texts to evaluate on if there is no validation split or file."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the texts. By default text, or the only column of strings."}
    )
    packing: str = field(
        default="wrapped",
        metadata={
            "help": "wrapped joins texts and cuts them into blocks; lines makes one sequence of each text, which ends with EOS and "
            "padding, so that the model learns where texts end.",
            "choices": ["wrapped", "lines"],
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column with prompts that the texts answer; they are known tokens. Needs --packing lines."},
    )
    preprocessing: str | None = field(
        default=None,
        metadata={
            "help": "lm1b undoes the tokenization of that corpus; characters is for text8.",
            "choices": [*PREPROCESSING],
        },
    )
    sample_by: str = field(
        default="line", metadata={"help": "Unit of text in txt files.", "choices": ["line", "paragraph", "document"]}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset instead of preparing it first."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Length of the training sequences in tokens. By default the model's length; for a new model with --packing lines "
            "the longest text's, at most 1,024."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenize."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Maximum number of training texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Maximum number of validation texts."})

    def __post_init__(self):
        names = ("block_size", "max_train_samples", "max_eval_samples")
        least = {**dict.fromkeys(names, 1), "preprocessing_num_workers": 0, "validation_split_percentage": 0}
        check_numbers(self, least, {"validation_split_percentage": 100})


def check_chosen(chosen: Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """
    Checks that there is an output folder, and lets a file of texts replace a dataset.

    Args:
        chosen (`Namespace`): All arguments of the command.
        settings (`dict[str, Any]`): The settings of its YAML file.

    Returns:
        `dict[str, Any]`: the settings, without a dataset if the command line has `train_file`.
    """
    if chosen.output_dir is None:  # TrainingArguments would choose `trainer_output`
        raise ValueError("`output_dir` is missing: pass a folder to write to.")
    if chosen.train_file is not None and "train_file" not in settings:
        return {name: value for name, value in settings.items() if name not in _DATASET_SETTINGS}
    return settings


def should_train(args: TrainingArguments) -> bool:
    """Whether to train, not only to evaluate. `TrainingArguments` also sets `do_eval` for evaluations during training."""
    return args.do_train or not args.do_eval or args.eval_strategy != "no"


def check_output_dir(args: TrainingArguments):
    """
    Checks that a training overwrites no other one, and finds the checkpoint to resume from, if it is the last one.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments with the `output_dir`.

    Raises:
        `ValueError`: if the folder has a training that is not resumed, or lacks the checkpoint to resume from.
    """
    if Path(args.output_dir).is_file():
        raise ValueError(f"`output_dir`: {args.output_dir} is a file; pass a folder.")
    if not should_train(args):
        args.resume_from_checkpoint = None
        return
    if str(args.resume_from_checkpoint).lower() == "false":  # as in a YAML file
        args.resume_from_checkpoint = None
    if str(args.resume_from_checkpoint).lower() == "true":
        args.resume_from_checkpoint = find_checkpoint(args.output_dir)
        if args.resume_from_checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint`: there is no checkpoint in {args.output_dir}; leave it out to start."
            )
        return
    if args.resume_from_checkpoint is not None:
        if (problem := describe_problem(args.resume_from_checkpoint)) is not None:
            raise ValueError(f"`resume_from_checkpoint`: {problem} Pass another folder checkpoint-N, or true.")
        return
    patterns = ("*model*.safetensors", "checkpoint-*")
    if found := [path.name for pattern in patterns for path in Path(args.output_dir).glob(pattern)]:
        raise ValueError(
            f"`output_dir`: {args.output_dir} already has a training ({found[0]}). Pass another folder, or "
            "--resume_from_checkpoint true to continue from its last checkpoint."
        )


def check_reports(args: TrainingArguments):
    """Raises a `ValueError` for an unknown tracker in `report_to`, and for one whose package is missing."""
    with errors_about("report_to", ValueError, RuntimeError, ImportError):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()


def load_datasets(arguments: DataArguments) -> dict:
    """Loads the texts that the arguments name, by split."""
    names = (
        "dataset_name dataset_config_name train_file validation_file streaming sample_by dataset_revision train_split"
    )
    names += " validation_split text_column prompt_column"
    options = {name: getattr(arguments, name) for name in names.split()}
    try:
        dataset = load_texts(**options, validation_percentage=arguments.validation_split_percentage)
    except ValueError as error:
        raise ValueError(str(error).replace("`validation_percentage`", "`validation_split_percentage`")) from error
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        if limit is not None and split in dataset:
            dataset[split] = dataset[split].take(limit)  # the one method that streams and tables share
    if arguments.streaming:  # the trainer shuffles tables
        dataset["train"] = dataset["train"].shuffle(seed=0, buffer_size=10_000)
    return dataset


def load_pretrained(argument: str, auto_class: type, name: str, **options):
    """
    Loads a model or a tokenizer.

    Args:
        argument (`str`): The argument that names it.
        auto_class (`type`): The class to load it with, such as [`~transformers.AutoModel`].
        name (`str`): A name on the Hub, or a folder.
        options: Arguments of `from_pretrained`.

    Raises:
        `ValueError`: if it cannot be found, is damaged or lacks weights, or lacks a package that its attention needs.
    """
    check_model(argument, name)
    with errors_about(argument, OSError), errors_about("attn_implementation", ImportError):
        return load_checked(auto_class, name, **options)


def load_model(
    argument: str,
    name: str,
    required_settings: dict[str, Any],
    hint: str = "",
    model_types: tuple[str, ...] = FLOW_MODEL_TYPES,
    **options,
) -> PreTrainedModel:
    """
    Loads a model to continue training. `per_token_timesteps` may be switched on, but the time reparameterization cannot
    change.

    Args:
        argument (`str`): The argument that names the model.
        name (`str`): A name on the Hub, or a folder.
        required_settings (`dict[str, Any]`): Settings that its configuration must have.
        hint (`str`, *optional*): As for [`check_model_type`].
        model_types (`tuple[str, ...]`, *optional*): As for [`check_model_type`].
        options: Arguments of `from_pretrained`.
    """
    model = load_pretrained(argument, AutoModel, name, dtype=torch.float32, **options)
    check_model_type(argument, model, hint, model_types)
    if "per_token_timesteps" in required_settings:
        model.config.per_token_timesteps = required_settings["per_token_timesteps"]
    different = [key for key, value in required_settings.items() if getattr(model.config, key) != value]
    if different:
        raise ValueError(f"`{argument}`: {', '.join(different)} differs from the preset's; pass a matching `preset`.")
    return model


def load_tokenizer(argument: str, name: str) -> PreTrainedTokenizerBase:
    """
    Loads a tokenizer, and adds the special tokens that packing needs unless it has no BOS and EOS token to derive them from.

    Args:
        argument (`str`): The argument that names the tokenizer.
        name (`str`): A name on the Hub, or a folder.
    """
    tokenizer = load_pretrained(argument, AutoTokenizer, name)
    boundary_tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    if all(token is None for token in boundary_tokens) and not has_characters_only(tokenizer):
        logger.warning(f"The tokenizer of {name} has no BOS and EOS token: texts are joined without a separator.")
        return tokenizer
    return add_special_tokens(tokenizer)


def pack_datasets(
    dataset: dict,
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    training_args: FLMTrainingArguments,
) -> dict:
    """Tokenizes the training and validation texts, and packs or pads them to sequences of equal length."""
    block_size = arguments.block_size or max_length
    if block_size > max_length:
        raise ValueError(f"`block_size` must be at most {max_length}, the model's length, got {block_size}.")
    options = {"text_column": arguments.text_column, "num_proc": arguments.preprocessing_num_workers}
    if arguments.packing == "lines":
        if arguments.preprocessing is not None:
            raise ValueError("`preprocessing` is for --packing wrapped: leave it out.")
        make, options = pad_dataset, {**options, "length": block_size, "prompt_column": arguments.prompt_column}
    else:
        make = pack_dataset
        options |= {"block_size": block_size, "preprocessing": arguments.preprocessing}
        options["boundaries"] = tokenizer.eos_token_id is not None
    if training_args.eval_strategy != "no" and "validation" not in dataset:
        raise ValueError(
            "`eval_strategy` needs validation texts: pass `validation_file`, or `validation_split_percentage` above 0 without "
            "`streaming`."
        )
    if arguments.streaming and training_args.max_steps <= 0 and should_train(training_args):
        raise ValueError("`max_steps` is missing: the length of a stream is unknown.")
    packed = {}
    with training_args.main_process_first(desc="packing"):
        packed["train"] = _make(make, dataset["train"], tokenizer, options)
        if "validation" in dataset:
            try:
                packed["validation"] = _make(make, dataset["validation"], tokenizer, options)
            except ValueError as error:
                remedy = "A larger `validation_split_percentage` keeps more of the training texts, and 0 none."
                raise ValueError(f"Validation texts: {error} {remedy}") from error
    if arguments.packing == "wrapped":
        _warn_about_fragments(packed["train"], tokenizer)
    return packed


def _make(
    make: Callable, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, options: dict
) -> Any:
    """Packs or pads texts. Errors about the `length` of [`pad_dataset`] name `block_size`."""
    try:
        return make(dataset, tokenizer, **options)
    except ValueError as error:
        if "`length`" not in str(error):
            raise
        raise ValueError(str(error).replace("`length`", "`block_size`")) from error


def _warn_about_fragments(blocks: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase):
    """Warns if blocks have several texts each, as samples of the model will."""
    if tokenizer.eos_token_id is None:
        return
    first = [block["input_ids"] for block in blocks.take(100)]
    num_ends = sum(block[:-1].count(tokenizer.eos_token_id) for block in first)  # a block ends with EOS, too
    if num_ends > len(first):
        logger.warning(
            f"Texts are joined and cut into blocks: the first blocks have the ends of {num_ends / len(first):.1f} texts each, and "
            "so will samples. For one text a sample pass --packing lines."
        )


def check_prompts(arguments: DataArguments, training_args: FLMTrainingArguments):
    """Checks that `prompt_column` has a fitting `packing`, and makes prompts known tokens."""
    if arguments.prompt_column is None:
        return
    if arguments.packing != "lines":
        raise ValueError("`prompt_column` needs sequences of one text each: pass --packing lines.")
    training_args.prompts_from_labels = True


def read_data_settings(name: str, chosen: Namespace) -> dict[str, Any]:
    """
    Reads the data arguments that a model was trained with, if it has a record of them.

    Args:
        name (`str`): The name of the model on the Hub, or its folder.
        chosen (`Namespace`): All arguments of the command. If they name other data, only `block_size` and `packing` are returned.
    """
    path = cached_file(name, DATA_SETTINGS_NAME, _raise_exceptions_for_missing_entries=False)
    if path is not None and (damage := describe_damage(path)) is not None:
        raise ValueError(f"`teacher`: {damage}")
    settings = {} if path is None else json.loads(Path(path).read_text())
    if chosen.dataset_name is not None or chosen.train_file is not None:
        settings = {key: value for key, value in settings.items() if key in ("block_size", "packing")}
    return settings


def _warn_of_changes(saved: dict[str, Any], current: dict[str, Any]):
    """Warns of data arguments that differ from those of the training that resumes."""
    if changes := describe_changes(saved, current, ("preprocessing_num_workers", "max_eval_samples"), "`{}`"):
        listed = ", ".join(changes)
        logger.warning(with_flags(f"The training resumes with other data arguments: {listed}.", [DataArguments]))


class _DataSettingsCallback(TrainerCallback):
    """Records the data arguments of a training when it begins, unless it is refused or finished."""

    def __init__(self, path: Path, settings: str):
        self.path, self.settings = path, settings

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.settings)


def run(trainer: FLMTrainer, data_args: DataArguments):
    """Trains, evaluates and saves as `trainer.args` ask for. Records the data arguments beside the model."""
    args = trainer.args
    if args.should_save:
        settings = {name: value for name, value in vars(data_args).items() if value is not None}
        for name in ("dataset_name", "train_file", "validation_file"):
            if name in settings and Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).resolve())
        record = Path(args.output_dir, DATA_SETTINGS_NAME)
        if args.resume_from_checkpoint is not None and record.is_file():
            _warn_of_changes(json.loads(record.read_bytes()), json.loads(to_json(settings)))
        trainer.add_callback(_DataSettingsCallback(record, to_json(settings, indent=2) + "\n"))
    model = trainer.model
    if trainer.is_world_process_zero():
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {model.config.vocab_size:,} tokens")
    if should_train(args):
        if data_args.packing == "lines" and model.generation_config.pad_after_eos is None:
            model.generation_config.pad_after_eos = True  # texts of equal length have no padding to tell it from
        with friendly_errors(
            flags=["resume_from_checkpoint", "dataloader_drop_last", "gradient_accumulation_steps", "optim"]
        ):
            result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        if trainer.state.global_step > trainer._initial_global_step:  # not finished before
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", json.loads(to_json(result.metrics)))
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", json.loads(to_json(metrics)))
    if args.push_to_hub:
        trainer.push_to_hub()
