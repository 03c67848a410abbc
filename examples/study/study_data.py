# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What the stages of `study.py` share: arguments, texts, and the folders of the results."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import wordnet
from datasets import Dataset, DatasetInfo, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_flm.known_tokens_flm import lengths_up_to_eos
from modeling_flm.tokenization_flm import has_characters_only
from modeling_flm.trainers import find_text_column, load_texts, pack_dataset, pad_dataset, train_tokenizer


# All models, as tables and plots call them. `study_models.py` defines them.
LABELS = {
    "gpt2": "GPT-2",
    "mdlm": "MDLM",
    "duo": "Duo",
    "flm": "FLM",
    "fmlm": "FMLM",
    "fmlm_gamma_0": "FMLM, gamma 0",
}
# Fractions of the training after which the averaged weights are saved, to measure what more training brings.
FRACTIONS = (0.25, 0.5, 1.0)


@dataclass
class StudyArguments:
    """What to compare, at what size."""

    output_dir: str = field(metadata={"help": "Folder for all results."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Text file (txt, jsonl, csv or parquet). By default the definitions of WordNet."},
    )
    description: str = field(
        default="definitions of WordNet, a dictionary of English",
        metadata={"help": "Description of the texts, for model cards."},
    )
    wordnet_dir: str | None = field(
        default=None, metadata={"help": "Folder of the WordNet database, if Debian or Homebrew did not install it."}
    )
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "bpe, char or word: each text is one example; text8: 27 characters, texts are joined and cut into blocks.",
            "choices": ["bpe", "char", "word", "text8"],
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary size, except for text8."})
    length: int = field(
        default=32, metadata={"help": "Sequence length in tokens. Longer texts are dropped, except with text8."}
    )
    num_held_out: int = field(default=2000, metadata={"help": "Number of validation texts, and of test texts."})

    hidden_size: int = field(default=128, metadata={"help": "Width of all models."})
    num_hidden_layers: int = field(
        default=4, metadata={"help": "Blocks of each model. GPT-2 gets as many as match the number of parameters."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of all models."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of all models."})

    models: list[str] = field(default_factory=lambda: list(LABELS), metadata={"help": "Models to compare."})
    only: list[str] | None = field(default=None, metadata={"help": "Train or sample only these models."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Train each model once per seed."})
    prompt_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of examples in which flow-based models get some tokens as a prompt."}
    )
    batch_size: int = field(default=64, metadata={"help": "Examples per optimizer step."})
    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps of a model trained from scratch."})
    distillation_steps: int = field(default=2500, metadata={"help": "Optimizer steps of a distilled model."})
    warmup_steps: int = field(default=100, metadata={"help": "Warm-up steps of the learning rate."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3], metadata={"help": "Candidates of the learning-rate search."}
    )
    search_steps: int = field(default=500, metadata={"help": "Optimizer steps per candidate of the search."})
    ema_decay: float = field(default=0.998, metadata={"help": "Decay of the moving average of the weights."})
    save_steps: int = field(default=500, metadata={"help": "Optimizer steps between checkpoints."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})

    scorer_hidden_size: int = field(default=192, metadata={"help": "Width of the GPT-2 that scores samples."})
    scorer_num_hidden_layers: int = field(default=6, metadata={"help": "Blocks of the scorer."})
    scorer_max_steps: int = field(default=8000, metadata={"help": "Optimizer steps of the scorer."})

    keep_dir: str | None = field(
        default=None, metadata={"help": "Folder that the stage `keep` writes, such as outputs/kept."}
    )

    num_samples: int = field(default=512, metadata={"help": "Samples per model, number of steps and temperature."})
    num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "Numbers of forward passes to sample with."}
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.7, 0.85, 1.0],
        metadata={"help": "Sampling temperatures, where they have an effect."},
    )
    num_times: int = field(default=32, metadata={"help": "Noise levels per text for a bound of the likelihood."})
    num_likelihood_texts: int = field(default=500, metadata={"help": "Test texts whose likelihood is measured."})


# Texts


def read_texts(args: StudyArguments) -> list[str]:
    """Returns the distinct texts in random order."""
    if args.train_file is None:
        texts = list(wordnet.definitions(wordnet.find_wordnet(args.wordnet_dir)))
    else:
        dataset = load_texts(train_file=args.train_file, validation_percentage=0)["train"]
        texts = dataset[find_text_column(dataset)]
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[index] for index in order]


def to_characters(text: str) -> str:
    """Reduces a text to the letters from a to z and single spaces."""
    return " ".join(re.findall("[a-z]+", text.lower()))


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, args: StudyArguments) -> Dataset:
    """
    Makes examples of `args.length` tokens. With a tokenizer of 27 characters, texts are joined and cut into blocks; otherwise each text is
    one example, followed by an end-of-text token and padding.
    """
    if has_characters_only(tokenizer):
        examples = pack_dataset(Dataset.from_dict({"text": [f"{text} " for text in texts]}), tokenizer, args.length)
    else:
        examples = pad_dataset(Dataset.from_dict({"text": texts}), tokenizer, args.length)
    input_ids = examples["input_ids"][:]
    info = DatasetInfo(description=args.description)
    return Dataset.from_dict({"input_ids": input_ids, "labels": input_ids}, info=info)


def make_data(args: StudyArguments):
    """Writes the texts of each split, their tokens, and the tokenizer."""
    folder = Path(args.output_dir, "data")
    if (folder / "done").exists():
        return
    texts = read_texts(args)
    if len(texts) <= 3 * args.num_held_out:
        raise SystemExit(
            f"error: --num_held_out {args.num_held_out} is too large: {len(texts)} texts leave too few to train on"
        )
    if args.tokenizer == "text8":
        texts = list(map(to_characters, texts))
    splits = {
        "validation": texts[: args.num_held_out],
        "test": texts[args.num_held_out : 2 * args.num_held_out],
        "train": texts[2 * args.num_held_out :],
    }
    tokenizer = train_tokenizer(splits["train"], args.tokenizer, args.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, split in splits.items():
        dataset = tokenize(split, tokenizer, args)
        dataset.save_to_disk(folder / name)
        decoded = decode(dataset["input_ids"][:], tokenizer)
        (folder / f"{name}.txt").write_text("\n".join(decoded) + "\n", encoding="utf-8")
        print(f"{name}: {len(dataset):,} examples of {args.length} tokens, from {len(split):,} texts. The first one:")
        print(f"    {decoded[0]}")
    (folder / "done").touch()


def decode(sequences: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decodes sequences of equal length up to their end-of-text token, each to one line."""
    lengths = lengths_up_to_eos(torch.tensor(sequences), tokenizer.eos_token_id, tokenizer.bos_token_id).tolist()
    sequences = [tokens[:length] for tokens, length in zip(sequences, lengths)]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]


@dataclass
class Data:
    """
    The results of the stage `data`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        tokens (`dict[str, Dataset]`): The examples of the splits `train`, `validation` and `test`.
        texts (`dict[str, list[str]]`): The same examples as texts.
    """

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


# Folders


def snapshot_name(fraction: float) -> str:
    return f"after-{fraction:g}"


def model_folder(name: str, seed: int, args: StudyArguments) -> Path:
    return Path(args.output_dir, "models", f"{name}-{seed}")
