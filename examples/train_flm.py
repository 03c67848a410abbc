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
"""
Train a flow-based language model on a dataset of the Hub or on text files.

    python examples/train_flm.py --train_file corpus.txt --train_tokenizer bpe --vocab_size 2048 --output_dir outputs/flm

Every flag can also stand in a YAML file, given as the first argument; flags after it take precedence:

    accelerate launch examples/train_flm.py config.yaml --learning_rate 1e-3
"""

import math
import sys
from dataclasses import dataclass, field

import yaml
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from modeling_flm import FLMConfig, FLMModel
from trainers import FLMTrainer, FLMTrainingArguments, add_special_tokens, load_texts, pack_dataset, train_tokenizer


logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """Which model and tokenizer to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained FLM to go on from. A new one is initialized unless given."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a new model, such as hidden_size=256,num_hidden_layers=4; see FLMConfig."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Name or folder of a trained tokenizer."})
    train_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Train a tokenizer on the training texts.", "choices": ["bpe", "char", "word"]},
    )
    vocab_size: int = field(default=8192, metadata={"help": "The largest vocabulary for --train_tokenizer."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flex_attention or flash_attention_2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run model code that comes with --model_name_or_path."}
    )


@dataclass
class DataArguments:
    """Which texts to train on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset of the Hub, or its folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "A txt, json, jsonl, csv or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "A file like it to evaluate on."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "How much of the training texts to evaluate on where there is no validation split."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column with the texts."})
    sample_by: str = field(
        default="line", metadata={"help": "What a text is in txt files.", "choices": ["line", "paragraph", "document"]}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while training instead of before."})
    block_size: int | None = field(
        default=None, metadata={"help": "The length of the texts in tokens. The model's length unless given."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenization."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training texts."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation texts."})


def parse_arguments() -> tuple[ModelArguments, DataArguments, FLMTrainingArguments]:
    """Arguments from the command line, with those of a YAML file as defaults."""
    parser = HfArgumentParser((ModelArguments, DataArguments, FLMTrainingArguments))
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        with open(arguments[0], encoding="utf-8") as file:
            defaults = yaml.safe_load(file)
        known = {action.dest for action in parser._actions}
        if unknown := sorted(defaults.keys() - known):
            raise SystemExit(f"{arguments[0]}: unknown settings {', '.join(unknown)}")
        parser.set_defaults(**defaults)
        arguments = arguments[1:]
    return parser.parse_args_into_dataclasses(arguments)


def get_tokenizer(arguments: ModelArguments, texts, training_args: FLMTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or one trained on the texts."""
    given = [arguments.tokenizer_name, arguments.train_tokenizer, arguments.model_name_or_path]
    if not any(given):
        raise SystemExit("Pass --tokenizer_name, --train_tokenizer or --model_name_or_path.")
    if arguments.train_tokenizer is None:
        name = arguments.tokenizer_name or arguments.model_name_or_path
        return add_special_tokens(AutoTokenizer.from_pretrained(name))
    # One process trains it, and the others read what it wrote.
    with training_args.main_process_first(desc="training the tokenizer"):
        if training_args.should_save:
            tokenizer = train_tokenizer(texts, arguments.train_tokenizer, arguments.vocab_size)
            tokenizer.save_pretrained(training_args.output_dir)
        return AutoTokenizer.from_pretrained(training_args.output_dir)


def get_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int | None) -> FLMModel:
    """The model that the arguments name, or a new one for the tokenizer."""
    options = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path is not None:
        if arguments.config_overrides is not None:
            raise SystemExit("--config_overrides is for a new model, and does not go with --model_name_or_path.")
        return AutoModel.from_pretrained(
            arguments.model_name_or_path, trust_remote_code=arguments.trust_remote_code, **options
        )
    overrides = yaml.safe_load("{" + (arguments.config_overrides or "").replace("=", ": ") + "}")
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
    return AutoModel.from_config(AutoConfig.for_model("flm", **{**settings, **overrides}), **options)


def main():
    model_args, data_args, training_args = parse_arguments()
    set_seed(training_args.seed)

    dataset = load_texts(
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        train_file=data_args.train_file,
        validation_file=data_args.validation_file,
        validation_percentage=data_args.validation_split_percentage,
        streaming=data_args.streaming,
        sample_by=data_args.sample_by,
    )
    for split, limit in (("train", data_args.max_train_samples), ("validation", data_args.max_eval_samples)):
        if limit is not None and split in dataset:
            # `take` is what streams and tables share.
            dataset[split] = dataset[split].take(limit)

    column = data_args.text_column or "text"
    tokenizer = get_tokenizer(model_args, (row[column] for row in dataset["train"]), training_args)
    model = get_model(model_args, tokenizer, data_args.block_size)
    block_size = data_args.block_size or model.config.max_position_embeddings
    if block_size > model.config.max_position_embeddings:
        raise SystemExit(f"--block_size is {block_size}, above the model's {model.config.max_position_embeddings}.")
    with training_args.main_process_first(desc="packing"):
        packed = {
            split: pack_dataset(
                dataset[split],
                tokenizer,
                block_size=block_size,
                text_column=data_args.text_column,
                num_proc=data_args.preprocessing_num_workers,
            )
            for split in ("train", "validation")
            if split in dataset
        }
    logger.warning(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, texts of {block_size} tokens")

    trainer = FLMTrainer(
        model=model,
        args=training_args,
        train_dataset=packed["train"],
        eval_dataset=packed.get("validation"),
        processing_class=tokenizer,
    )
    if training_args.do_train or not training_args.do_eval:
        checkpoint = training_args.resume_from_checkpoint
        result = trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    if "validation" in packed:
        metrics = trainer.evaluate()
        metrics["perplexity_bound"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
