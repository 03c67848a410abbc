# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What the stages of `study.py` share: its arguments, its texts, and where everything lies."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import wordnet
from datasets import Dataset, DatasetInfo, load_from_disk
from study_models import CONTENDERS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_flm.tokenization_flm import has_characters_only
from modeling_flm.trainers import find_text_column, load_texts, pack_dataset, train_tokenizer


# Parts of the training after which the average of the weights is kept, to see what more of it brings.
FRACTIONS = (0.25, 0.5, 1.0)


@dataclass
class StudyArguments:
    """What to compare, and how long."""

    output_dir: str = field(metadata={"help": "Where everything is written."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "A txt, jsonl, csv or parquet file of texts. By default WordNet's definitions."},
    )
    description: str = field(
        default="definitions of WordNet, a dictionary of English",
        metadata={"help": "What the texts are, for model cards."},
    )
    wordnet_dir: str | None = field(default=None, metadata={"help": "Where WordNet is, if not where Debian puts it."})
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "bpe, or char for characters, or word: a text at a time; text8: 27 characters, packed.",
            "choices": ["bpe", "char", "word", "text8"],
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of a tokenizer that is not text8."})
    length: int = field(default=32, metadata={"help": "Tokens of a text; longer ones are left out, unless packed."})
    num_held_out: int = field(default=2000, metadata={"help": "Texts for validation, and as many for the test."})

    hidden_size: int = field(default=128, metadata={"help": "Of all models."})
    num_hidden_layers: int = field(
        default=4, metadata={"help": "Of all models but GPT-2, which has as many parameters."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Of all models."})
    dropout: float = field(default=0.0, metadata={"help": "Of all models."})

    models: list[str] = field(default_factory=lambda: list(CONTENDERS), metadata={"help": "Which to compare."})
    only: list[str] | None = field(default=None, metadata={"help": "Train or sample only these of them."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "A training of each model for each."})
    prompt_fraction: float = field(
        default=0.0, metadata={"help": "Share of the texts of which flows and flow maps learn to write a part only."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts of an optimizer step."})
    max_steps: int = field(
        default=5000, metadata={"help": "Optimizer steps of all models but those that are distilled."}
    )
    distillation_steps: int = field(default=2500, metadata={"help": "Those of the distilled, beside their teacher's."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps in which the learning rate rises."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3], metadata={"help": "Those to search among."}
    )
    search_steps: int = field(default=500, metadata={"help": "Optimizer steps at each of them."})
    ema_decay: float = field(default=0.998, metadata={"help": "Of the moving average of all models."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})

    scorer_hidden_size: int = field(default=192, metadata={"help": "Of the GPT-2 that scores."})
    scorer_num_hidden_layers: int = field(default=6, metadata={"help": "Its blocks."})
    scorer_max_steps: int = field(default=8000, metadata={"help": "Its optimizer steps."})

    keep_dir: str | None = field(
        default=None, metadata={"help": "Where to keep a flow map in bfloat16, for `keep`, such as outputs/kept."}
    )

    num_samples: int = field(default=512, metadata={"help": "Texts of each model and number of steps."})
    num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "Numbers of forward passes."}
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.7, 0.85, 1.0], metadata={"help": "Of the texts, where they can have one."}
    )
    num_times: int = field(default=32, metadata={"help": "How often a text is noised for a bound."})
    num_likelihood_texts: int = field(default=500, metadata={"help": "Held-out texts whose likelihood is measured."})


# Texts


def read_texts(args: StudyArguments) -> list[str]:
    """All texts, in random order."""
    if args.train_file is None:
        texts = list(wordnet.definitions(wordnet.find_wordnet(args.wordnet_dir)))
    else:
        dataset = load_texts(train_file=args.train_file, validation_percentage=0)["train"]
        texts = dataset[find_text_column(dataset)]
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[index] for index in order]


def to_characters(text: str) -> str:
    """A text in the letters from a to z and single spaces."""
    return " ".join(re.findall("[a-z]+", text.lower()))


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, args: StudyArguments) -> Dataset:
    """Texts of one length: with an end, and what fills them up; or of characters one after the other, cut into blocks."""
    if has_characters_only(tokenizer):
        blocks = pack_dataset(Dataset.from_dict({"text": [f"{text} " for text in texts]}), tokenizer, args.length)
        input_ids = blocks["input_ids"][:]
    else:
        token_lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
        token_lists = [[*tokens, tokenizer.eos_token_id] for tokens in token_lists if len(tokens) < args.length]
        input_ids = [tokens + [tokenizer.pad_token_id] * (args.length - len(tokens)) for tokens in token_lists]
    info = DatasetInfo(description=args.description)
    return Dataset.from_dict({"input_ids": input_ids, "labels": input_ids}, info=info)


def make_data(args: StudyArguments):
    """Writes the texts of each split, their tokens, and the tokenizer."""
    folder = Path(args.output_dir, "data")
    if (folder / "done").exists():
        return
    texts = read_texts(args)
    if len(texts) <= 3 * args.num_held_out:
        raise SystemExit(f"error: --num_held_out {args.num_held_out} takes too many of {len(texts)} texts, twice")
    if args.tokenizer == "text8":
        texts = list(map(to_characters, texts))
    cuts = {"validation": slice(args.num_held_out), "test": slice(args.num_held_out, 2 * args.num_held_out)}
    cuts["train"] = slice(2 * args.num_held_out, None)
    tokenizer = train_tokenizer(texts[cuts["train"]], args.tokenizer, args.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, cut in cuts.items():
        dataset = tokenize(texts[cut], tokenizer, args)
        dataset.save_to_disk(folder / name)
        (folder / f"{name}.txt").write_text(
            "\n".join(decode(dataset["input_ids"][:], tokenizer)) + "\n", encoding="utf-8"
        )
        print(f"{name}: {len(dataset):,} texts of {args.length} tokens, from {len(texts[cut]):,}, such as")
        print(f"    {decode(dataset['input_ids'][:1], tokenizer)[0]}")
    (folder / "done").touch()


def decode(token_lists: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of tokens, up to their end, each on one line."""
    end = tokenizer.eos_token_id
    if end is not None:
        token_lists = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in token_lists]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(token_lists, skip_special_tokens=True)]


@dataclass
class Data:
    """What the stages after the first one read."""

    tokenizer: PreTrainedTokenizerBase
    tokens: dict[str, Dataset]
    texts: dict[str, list[str]]

    @classmethod
    def load(cls, args: StudyArguments) -> "Data":
        folder = Path(args.output_dir, "data")
        if not (folder / "done").exists():
            raise SystemExit(f"error: {folder} has no texts yet: run the stage `data` first")
        splits = ("train", "validation", "test")
        return cls(
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            {name: load_from_disk(folder / name) for name in splits},
            {name: (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in splits},
        )


# Where everything lies


def snapshot_name(fraction: float) -> str:
    return f"after-{fraction:g}"


def model_folder(name: str, seed: int, args: StudyArguments) -> Path:
    return Path(args.output_dir, "models", f"{name}-{seed}")
