# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What `flm-train` and `flm-distill` share: the texts that their arguments name, and the run of a training."""

import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file, logging

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.hub.records import DATA_SETTINGS_NAME
from modeling_flm.tokenization_flm import add_special_tokens, has_characters_only

from ..data import PREPROCESSING, load_texts, pack_dataset
from ..flm_config import FLMTrainingArguments
from ..flm_trainer import FLMTrainer
from .command_line import check_kind, check_model


logger = logging.get_logger(__name__)


@dataclass
class DataArguments:
    """Which texts to train on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset of the Hub, or its folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of that dataset."})
    train_split: str = field(default="train", metadata={"help": "The split to train on, or a part, train[:-1000]."})
    validation_split: str | None = field(
        default=None, metadata={"help": "The same to evaluate on. By default validation, if there is one."}
    )
    train_file: str | None = field(default=None, metadata={"help": "A txt, json, jsonl, csv or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "A file like it to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "How much of the training texts to evaluate on where there is no validation split."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column with the texts."})
    preprocessing: str | None = field(
        default=None,
        metadata={
            "help": "lm1b undoes that corpus's tokenization; characters is for text8.",
            "choices": [*PREPROCESSING],
        },
    )
    sample_by: str = field(
        default="line", metadata={"help": "What a text is in txt files.", "choices": ["line", "paragraph", "document"]}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while training instead of before."})
    block_size: int | None = field(
        default=None, metadata={"help": "The length of the texts in tokens. By default the model's length."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenization."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation texts."})


def trains(args: TrainingArguments) -> bool:
    """Whether a script is to train, not only to evaluate. Evaluating during the training also sets `do_eval`."""
    return args.do_train or not args.do_eval or args.eval_strategy != "no"


def check_output_dir(args: TrainingArguments):
    """
    Raises a `ValueError` where a training would overwrite another one.

    Args:
        args ([`~transformers.TrainingArguments`]): The arguments, whose `output_dir` it is.
    """
    if Path(args.output_dir).is_file():
        raise ValueError(f"`output_dir`: {args.output_dir} is a file; name a folder.")
    checkpoint = args.resume_from_checkpoint
    if not trains(args):
        return
    if str(checkpoint).lower() == "true":
        if not Path(args.output_dir).is_dir() or get_last_checkpoint(args.output_dir) is None:
            raise ValueError(
                f"`resume_from_checkpoint`: there is no checkpoint in {args.output_dir}; leave it out to begin."
            )
        return
    if checkpoint is not None:
        if not Path(checkpoint, "trainer_state.json").is_file():
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} is no checkpoint; pass a folder checkpoint-N, or true."
            )
        return
    patterns = ("*model*.safetensors", "checkpoint-*")
    if found := [path.name for pattern in patterns for path in Path(args.output_dir).glob(pattern)]:
        raise ValueError(
            f"`output_dir`: {args.output_dir} has a training already ({found[0]}). Name another folder, or pass "
            "--resume_from_checkpoint true to go on with its last checkpoint."
        )


def load_datasets(arguments: DataArguments) -> dict:
    """The texts that the arguments name, by split."""
    dataset = load_texts(
        dataset_name=arguments.dataset_name,
        dataset_config_name=arguments.dataset_config_name,
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        validation_percentage=arguments.validation_split_percentage,
        streaming=arguments.streaming,
        sample_by=arguments.sample_by,
        dataset_revision=arguments.dataset_revision,
        train_split=arguments.train_split,
        validation_split=arguments.validation_split,
        text_column=arguments.text_column,
    )
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        if limit is not None and split in dataset:
            dataset[split] = dataset[split].take(limit)  # what streams and tables share
    if arguments.streaming:  # tables are shuffled by the trainer
        dataset["train"] = dataset["train"].shuffle(seed=0, buffer_size=10_000)
    return dataset


def load_model(
    flag: str, name: str, told: dict, hint: str = "", model_types: tuple[str, ...] = FLOW_MODEL_TYPES, **options
) -> PreTrainedModel:
    """
    A trained model to go on from. Any can be told times per token from now on, but none can count time differently.

    Args:
        flag (`str`): The flag that names it.
        name (`str`): Its name, or its folder.
        told (`dict`): Settings that it must have, such as `per_token_timesteps`.
        hint (`str`, *optional*): As for [`check_kind`].
        model_types (`tuple[str, ...]`, *optional*): As for [`check_kind`].
        options: Arguments of `from_pretrained`.
    """
    check_model(f"--{flag}", name)
    model = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    check_kind(f"--{flag}", model, hint, model_types)
    if "per_token_timesteps" in told:
        model.config.per_token_timesteps = told["per_token_timesteps"]
    if different := [name for name, value in told.items() if getattr(model.config, name) != value]:
        raise SystemExit(f"--{flag}: its {', '.join(different)} is another than the preset's; choose another preset.")
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    A tokenizer with the special tokens that texts need. One that has none to begin and end texts, as that of the quickstart's
    models, stays so.

    Args:
        name (`str`): Its name, or its folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    marks = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.cls_token, tokenizer.sep_token)
    if all(token is None for token in marks) and not has_characters_only(tokenizer):
        logger.warning(f"The tokenizer of {name} has no tokens to begin and end texts, which are joined without.")
        return tokenizer
    return add_special_tokens(tokenizer)


def pack_datasets(
    dataset: dict,
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    training_args: FLMTrainingArguments,
) -> dict:
    """The training and validation texts in blocks."""
    block_size = arguments.block_size or max_length
    if block_size > max_length:
        raise SystemExit(f"--block_size is {block_size}, above the model's {max_length}.")
    options = {
        "block_size": block_size,
        "text_column": arguments.text_column,
        "num_proc": arguments.preprocessing_num_workers,
        "preprocessing": arguments.preprocessing,
        "boundaries": tokenizer.eos_token_id is not None,
    }
    packed = {}
    with training_args.main_process_first(desc="packing"):
        packed["train"] = pack_dataset(dataset["train"], tokenizer, **options)
        if "validation" in dataset:
            try:
                packed["validation"] = pack_dataset(dataset["validation"], tokenizer, **options)
            except ValueError as error:
                remedy = "A larger `validation_split_percentage` keeps more of the training texts, and 0 none."
                raise ValueError(f"Validation texts: {error} {remedy}") from error
    return packed


def read_data_settings(name: str, chosen: Namespace) -> dict:
    """
    The data arguments that the model with this name, or in this folder, was trained with, if it says so; where other data
    were chosen, only the length of the texts.
    """
    path = cached_file(name, DATA_SETTINGS_NAME, _raise_exceptions_for_missing_entries=False)
    settings = {} if path is None else json.loads(Path(path).read_text())
    if chosen.dataset_name is not None or chosen.train_file is not None:
        settings = {key: value for key, value in settings.items() if key == "block_size"}
    return settings


def run(trainer: FLMTrainer, data_args: DataArguments):
    """Trains, evaluates and saves, as `trainer.args` says; with the model, the data arguments that it was trained with."""
    args = trainer.args
    if args.should_save:
        settings = {name: value for name, value in vars(data_args).items() if value is not None}
        for name in ("dataset_name", "train_file", "validation_file"):
            if name in settings and Path(settings[name]).exists():
                settings[name] = str(Path(settings[name]).resolve())
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, DATA_SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n")
    model = trainer.model
    if trainer.is_world_process_zero():
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {model.config.vocab_size:,} tokens")
    if trains(args):
        checkpoint = args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
