# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Train a flow-based language model on a dataset of the Hub or on text files.

    flm-train --train_file corpus.txt --train_tokenizer bpe --vocab_size 2048 --output_dir outputs/flm

Every flag can also stand in a YAML file, given as the first argument; flags after it take precedence:

    accelerate launch -m modeling_flm.trainers.commands.train config.yaml --learning_rate 1e-3
"""

import re
from dataclasses import dataclass, field

import yaml
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from modeling_flm import FLMConfig, FLMModel

from .. import (
    FLMTrainer,
    FLMTrainingArguments,
    find_text_column,
    train_tokenizer,
)
from .command_line import ScriptParser, check_model, explained
from .training import (
    DataArguments,
    check_output_dir,
    load_datasets,
    load_model,
    load_tokenizer,
    pack_datasets,
    run,
)


@dataclass
class ModelArguments:
    """Which model and tokenizer to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A trained model to go on from. By default a new one is initialized.",
            "aliases": ["--model"],
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a new model, such as hidden_size=256,num_hidden_layers=4; see FLMConfig."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Name or folder of a trained tokenizer."})
    train_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Train a tokenizer on the training texts.", "choices": ["bpe", "char", "word", "text8"]},
    )
    vocab_size: int = field(default=8192, metadata={"help": "The largest vocabulary for --train_tokenizer."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run model code that comes with --model_name_or_path."}
    )


def get_tokenizer(arguments: ModelArguments, texts, training_args: FLMTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or one trained on the texts."""
    for flag in ("tokenizer_name", "model_name_or_path"):
        if (source := getattr(arguments, flag)) is not None:
            check_model(f"--{flag}", source)
    given = [arguments.tokenizer_name, arguments.train_tokenizer, arguments.model_name_or_path]
    if not any(given):
        raise SystemExit("Pass --tokenizer_name, --train_tokenizer or --model_name_or_path.")
    if arguments.train_tokenizer is None:
        name = arguments.tokenizer_name or arguments.model_name_or_path
        return load_tokenizer(name)
    # One process trains it, and the others read what it wrote.
    with training_args.main_process_first(desc="training the tokenizer"):
        if training_args.should_save:
            tokenizer = train_tokenizer(texts, arguments.train_tokenizer, arguments.vocab_size)
            tokenizer.save_pretrained(training_args.output_dir)
        return AutoTokenizer.from_pretrained(training_args.output_dir)


def load_data(
    model_args: ModelArguments, data_args: DataArguments, training_args: FLMTrainingArguments
) -> tuple[dict, PreTrainedTokenizerBase]:
    """The texts that the arguments name, by split, and the tokenizer."""
    dataset = load_datasets(data_args)
    column = find_text_column(dataset["train"], data_args.text_column)
    # A stream may be endless: its start will do for a tokenizer.
    texts = (row[column] for row in dataset["train"].take(100_000))
    tokenizer = get_tokenizer(model_args, texts, training_args)
    return dataset, tokenizer


def get_model(
    arguments: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int | None,
    model_type: str = "flm",
    **told,
) -> FLMModel:
    """The model that the arguments name, or a new one for the tokenizer; `told` are settings that it must have."""
    options = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path is not None:
        if arguments.config_overrides is not None:
            raise SystemExit("--config_overrides is for a new model, and does not go with --model_name_or_path.")
        options["trust_remote_code"] = arguments.trust_remote_code
        if model_type == "flm":
            options |= {
                "model_types": ("flm",),
                "hint": " Flow maps are trained by `flm-train-fmlm` and `flm-distill`.",
            }
        else:
            options |= {"model_types": ("fmlm",), "hint": " `flm-distill` makes flow maps of FLMs."}
        return load_model("model_name_or_path", arguments.model_name_or_path, told, **options)
    text = re.sub(r"=\s*[Nn]one\b", "=null", arguments.config_overrides or "")
    overrides = yaml.safe_load("{" + text.replace("=", ": ") + "}")
    if unknown := sorted(name for name in overrides if not hasattr(FLMConfig(), name)):
        raise SystemExit(f"--config_overrides: FLMConfig has no {', '.join(unknown)}")
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if block_size is not None:
        settings["max_position_embeddings"] = block_size
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**settings, **told, **overrides}), **options)


def make_parser() -> ScriptParser:
    return ScriptParser([ModelArguments, DataArguments, FLMTrainingArguments], description=__doc__)


def train(model_args: ModelArguments, data_args: DataArguments, training_args: FLMTrainingArguments):
    with explained(ModelArguments, DataArguments, FLMTrainingArguments):
        check_output_dir(training_args)
        set_seed(training_args.seed)
        dataset, tokenizer = load_data(model_args, data_args, training_args)
        told = {"per_token_timesteps": True} if training_args.prompt_fraction > 0 else {}
        model = get_model(model_args, tokenizer, data_args.block_size, **told)
        packed = pack_datasets(dataset, data_args, tokenizer, model.config.max_position_embeddings, training_args)
        trainer = FLMTrainer(
            model=model,
            args=training_args,
            train_dataset=packed["train"],
            eval_dataset=packed.get("validation"),
            processing_class=tokenizer,
        )
    run(trainer, data_args)


def main(arguments: list[str] | None = None):
    train(*make_parser().parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
