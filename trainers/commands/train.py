# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Train a flow-based language model (FLM), or a flow map (FMLM) without a teacher, on a dataset of the Hub or on text files.

    flm-train --train_file corpus.txt --train_tokenizer bpe --vocab_size 2048 --output_dir outputs/flm
    flm-train --train_file molecules.txt --packing lines --train_tokenizer char --output_dir outputs/one_text_a_line
    flm-train --model_type fmlm --train_file corpus.txt --train_tokenizer bpe --output_dir outputs/fmlm_plus

Flow maps have two recipes: --preset any_order trains an FMLM+, which generates in any order, and --preset self_distillation an
FMLM. With --masked_model an FMLM+ starts from the weights of a masked diffusion model on the same network, whose last token is
the mask; with --masked_probability it learns from that model as well. To distill a trained FLM use flm-distill.

Every flag can also be set in a YAML file, passed as the first argument. Flags after it take precedence:

    accelerate launch -m modeling_flm.trainers.commands.train config.yaml --learning_rate 1e-3
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from modeling_flm import FLMConfig, FMLMModel

from .. import (
    PRESETS,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    find_text_column,
    longest_text,
    train_tokenizer,
)
from ..data.loading import check_text
from .command_line import ScriptParser, UniqueKeyLoader, check_model_type, errors_about, friendly_errors
from .training import (
    DataArguments,
    check_chosen,
    check_output_dir,
    check_prompts,
    check_reports,
    load_datasets,
    load_model,
    load_pretrained,
    load_tokenizer,
    pack_datasets,
    run,
    should_train,
)


logger = logging.get_logger(__name__)

# Length of a new model for texts of any length
_MAX_LINE = 1024

# Enough for an empty tokenizer of each type
_ANY_SIZE = 300

# The default of `preset` for flow maps
_FLOW_MAP_PRESET = "any_order"


@dataclass
class ModelArguments:
    """The model and tokenizer to train."""

    model_type: str = field(
        default="flm", metadata={"help": "flm, or fmlm for a flow map without a teacher.", "choices": ["flm", "fmlm"]}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": f"Recipe of a flow map. By default {_FLOW_MAP_PRESET}.",
            "choices": ["any_order", "self_distillation"],
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained model to continue training. By default a new one is initialized.",
            "aliases": ["--model"],
        },
    )
    masked_model: str | None = field(
        default=None, metadata={"help": "A masked diffusion model to start a flow map from (preset any_order)."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a new model, such as hidden_size=256,num_hidden_layers=4; see FLMConfig."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Name or folder of a trained tokenizer."})
    train_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Type of a tokenizer to train on the training texts.",
            "choices": ["bpe", "char", "word", "text8"],
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Maximum vocabulary size for --train_tokenizer."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code of the loaded models."})


def get_tokenizer(
    arguments: ModelArguments, texts: Iterable[str], training_args: FLMTrainingArguments
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the arguments name or that a resumed training has, or trains one on the texts."""
    if arguments.train_tokenizer is None:
        for argument in ("tokenizer_name", "model_name_or_path"):
            if (name := getattr(arguments, argument)) is not None:
                return load_tokenizer(argument, name)
        raise ValueError("Pass `tokenizer_name`, `train_tokenizer` or `model_name_or_path`.")
    if not should_train(training_args):
        raise ValueError("`train_tokenizer` is for a new training: leave it out to evaluate a model.")
    if training_args.resume_from_checkpoint is not None:  # its weights belong to its tokenizer
        tokenizer = load_pretrained("resume_from_checkpoint", AutoTokenizer, training_args.resume_from_checkpoint)
        check_trained_tokenizer(tokenizer, arguments)
        return tokenizer
    # One process trains it, and the others load the files.
    with training_args.main_process_first(desc="training the tokenizer"):
        if training_args.should_save:
            tokenizer = train_tokenizer(texts, arguments.train_tokenizer, arguments.vocab_size)
            tokenizer.save_pretrained(training_args.output_dir)
        return AutoTokenizer.from_pretrained(training_args.output_dir)


def check_trained_tokenizer(tokenizer: PreTrainedTokenizerBase, arguments: ModelArguments):
    """Raises a `ValueError` if the arguments ask for another type or size than that of a resumed training's tokenizer."""
    found, asked = (
        json.loads(each.backend_tokenizer.to_str())
        for each in (tokenizer, train_tokenizer([], arguments.train_tokenizer, _ANY_SIZE))
    )
    if (found["model"]["type"], found["pre_tokenizer"]) != (asked["model"]["type"], asked["pre_tokenizer"]) or (
        found["model"].get("unk_token") != asked["model"].get("unk_token")
    ):
        raise ValueError(
            f"`train_tokenizer` is {arguments.train_tokenizer}, but the resumed training has a tokenizer of another type: pass the same."
        )
    if arguments.train_tokenizer == "text8" or len(tokenizer) == arguments.vocab_size:
        return
    if len(tokenizer) > arguments.vocab_size:
        raise ValueError(
            f"`vocab_size` is {arguments.vocab_size}, but the resumed training has a tokenizer of {len(tokenizer)} tokens: pass the same."
        )
    logger.warning(f"The tokenizer of the checkpoint, with {len(tokenizer)} tokens, is kept.")


def load_data(
    model_args: ModelArguments, data_args: DataArguments, training_args: FLMTrainingArguments
) -> tuple[dict, PreTrainedTokenizerBase]:
    """The texts that the arguments name, by split, and the tokenizer."""
    dataset = load_datasets(data_args)
    columns = [find_text_column(dataset["train"], data_args.text_column)]
    if data_args.prompt_column is not None:
        columns.append(find_text_column(dataset["train"], data_args.prompt_column, "prompt_column"))
    # A stream may be endless: its start is enough for a tokenizer.
    texts = (check_text(row[column], column) for row in dataset["train"].take(100_000) for column in columns)
    tokenizer = get_tokenizer(model_args, texts, training_args)
    is_new = model_args.model_name_or_path is None and model_args.masked_model is None
    if data_args.packing == "lines" and data_args.block_size is None and is_new:
        if (checkpoint := training_args.resume_from_checkpoint) is not None:
            data_args.block_size = AutoConfig.from_pretrained(checkpoint).max_position_embeddings
        elif data_args.streaming:
            raise ValueError("`block_size` is missing: the longest text of a stream is unknown.")
        else:
            data_args.block_size = min(longest_text(dataset["train"], tokenizer, *columns), _MAX_LINE)
    return dataset, tokenizer


def new_model(
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int | None,
    required_settings: dict[str, Any],
) -> PreTrainedModel:
    """Initializes a model for the tokenizer with the settings in `config_overrides`."""
    with errors_about("config_overrides", StrictDataclassError, ValueError, yaml.YAMLError):
        text = re.sub(r"=\s*[Nn]one\b", "=null", arguments.config_overrides or "")
        overrides = yaml.load("{" + text.replace("=", ": ") + "}", UniqueKeyLoader)
        if unknown := sorted(name for name in overrides if not hasattr(FLMConfig(), name)):
            raise ValueError(f"FLMConfig has no {', '.join(unknown)}")
        settings = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if block_size is not None:
            settings["max_position_embeddings"] = block_size
        config = AutoConfig.for_model(arguments.model_type, **{**settings, **required_settings, **overrides})
    with errors_about("attn_implementation", ImportError):
        return AutoModel.from_config(config, attn_implementation=arguments.attn_implementation)


def load_masked_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Loads a masked diffusion model that a flow map with the vocabulary of the tokenizer can start from."""
    options = {"trust_remote_code": arguments.trust_remote_code, "attn_implementation": arguments.attn_implementation}
    masked_model = load_pretrained("masked_model", AutoModel, arguments.masked_model, **options)
    check_model_type("masked_model", masked_model)
    vocab_size = masked_model.config.vocab_size - 1
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"`tokenizer_name` has {len(tokenizer)} tokens, but the flow map has {vocab_size}: the tokens of `masked_model` "
            "without its last, the mask. Pass a tokenizer without the mask."
        )
    return masked_model


def get_model(
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int | None,
    required_settings: dict[str, Any],
) -> PreTrainedModel:
    """Loads the model that the arguments name, or initializes a new one."""
    if arguments.model_name_or_path is None:
        return new_model(arguments, tokenizer, block_size, required_settings)
    hints = {
        "flm": " Flow maps are trained with --model_type fmlm, or by flm-distill.",
        "fmlm": " To turn an FLM into a flow map, use flm-distill.",
    }
    return load_model(
        "model_name_or_path",
        arguments.model_name_or_path,
        required_settings,
        hint=hints[arguments.model_type],
        model_types=(arguments.model_type,),
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )


def check_arguments(arguments: ModelArguments, training_args: FMLMTrainingArguments):
    """Raises a `ValueError` for arguments that exclude each other."""
    if arguments.model_type == "flm":
        own = {each.name for each in fields(FLMTrainingArguments)}
        only_flow_maps = [each for each in fields(training_args) if each.name not in own]
        changed = [each.name for each in only_flow_maps if getattr(training_args, each.name) != each.default]
        changed += [name for name in ("preset", "masked_model") if getattr(arguments, name) is not None]
        if changed:
            raise ValueError(f"`{changed[0]}` is for flow maps: pass --model_type fmlm, or leave it out.")
    if arguments.model_name_or_path is not None and arguments.config_overrides is not None:
        raise ValueError("`config_overrides` is for a new model: leave out `model_name_or_path`, or it.")
    if arguments.masked_model is None:
        if training_args.masked_probability > 0:
            raise ValueError("`masked_probability` needs a `masked_model`.")
        return
    if arguments.preset not in (None, "any_order"):
        raise ValueError("`masked_model` needs --preset any_order.")
    for name in ("model_name_or_path", "config_overrides"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"`masked_model` determines weights and sizes: leave out `{name}`.")


def find_defaults(chosen: Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The preset of a flow map, and the settings of a YAML file."""
    settings = check_chosen(chosen, settings)
    return {**PRESETS[chosen.preset or _FLOW_MAP_PRESET], **settings} if chosen.model_type == "fmlm" else settings


def make_parser() -> ScriptParser:
    arguments = [ModelArguments, DataArguments, FMLMTrainingArguments]
    return ScriptParser(arguments, find_defaults, description=__doc__)


def train(model_args: ModelArguments, data_args: DataArguments, training_args: FMLMTrainingArguments):
    with friendly_errors(ModelArguments, DataArguments, FMLMTrainingArguments):
        check_arguments(model_args, training_args)
        check_output_dir(training_args)
        check_reports(training_args)
        check_prompts(data_args, training_args)
        set_seed(training_args.seed)
        dataset, tokenizer = load_data(model_args, data_args, training_args)
        required_settings, masked_model = {}, None
        if model_args.model_type == "fmlm" and model_args.preset in (None, "any_order"):
            required_settings = {"time_reparameterization": None}
        if required_settings or training_args.has_prompts:
            required_settings["per_token_timesteps"] = True
        if model_args.masked_model is None:
            model = get_model(model_args, tokenizer, data_args.block_size, required_settings)
        else:
            masked_model = load_masked_model(model_args, tokenizer)
            model = FMLMModel.from_masked(masked_model)
        packed = pack_datasets(dataset, data_args, tokenizer, model.config.max_position_embeddings, training_args)
        common = {
            "model": model,
            "train_dataset": packed["train"],
            "eval_dataset": packed.get("validation"),
            "processing_class": tokenizer,
        }
        if model_args.model_type == "flm":
            names = [each.name for each in fields(FLMTrainingArguments) if each.init]
            args = FLMTrainingArguments(**{name: getattr(training_args, name) for name in names})
            trainer = FLMTrainer(args=args, **common)
        else:
            masked_teacher = masked_model if training_args.masked_probability > 0 else None
            trainer = FMLMTrainer(args=training_args, masked_teacher=masked_teacher, **common)
    run(trainer, data_args)


def main(arguments: list[str] | None = None):
    train(*make_parser().parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
