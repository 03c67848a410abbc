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
"""From texts to batches: loading, tokenizers, packing, collation."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


# How `datasets` reads a file, by its ending.
_BUILDERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}


def load_texts(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    validation_percentage: int = 5,
    streaming: bool = False,
    sample_by: str = "line",
) -> DatasetDict | IterableDatasetDict:
    """
    Loads a dataset of the Hub, or files, with a `train` and a `validation` split.

    Args:
        dataset_name (`str`, *optional*): Name of a dataset of the Hub, or a folder with one.
        dataset_config_name (`str`, *optional*): Name of a configuration of that dataset.
        train_file (`str`, *optional*): A txt, json, jsonl, csv or parquet file to train on.
        validation_file (`str`, *optional*): A file like it to evaluate on.
        validation_percentage (`int`, *optional*, defaults to 5):
            How much of the training split becomes the validation split where there is none. Not for streaming.
        streaming (`bool`, *optional*, defaults to `False`): Read while training instead of before.
        sample_by (`str`, *optional*, defaults to `"line"`): What a text is in txt files: line, paragraph or document.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]

    Raises:
        `ValueError`: if neither or both of `dataset_name` and `train_file` are given, or a file has an unknown ending.
    """
    if (dataset_name is None) == (train_file is None):
        raise ValueError("Pass either `dataset_name` or `train_file`, and not both.")
    if dataset_name is not None:
        dataset = load_dataset(dataset_name, dataset_config_name, streaming=streaming)
    else:
        files = {"train": train_file, "validation": validation_file}
        files = {split: str(file) for split, file in files.items() if file is not None}
        endings = {Path(file).suffix.lstrip(".") for file in files.values()}
        if len(endings) != 1 or not endings <= _BUILDERS.keys():
            raise ValueError(
                f"`train_file` and `validation_file` must both be {', '.join(_BUILDERS)} files, got {sorted(files.values())}."
            )
        builder = _BUILDERS[endings.pop()]
        options = {"sample_by": sample_by} if builder == "text" else {}
        dataset = load_dataset(builder, data_files=files, streaming=streaming, **options)
    if "validation" not in dataset and not streaming and validation_percentage > 0:
        parts = dataset["train"].train_test_split(test_size=validation_percentage / 100, seed=0)
        dataset["train"], dataset["validation"] = parts["train"], parts["test"]
    return dataset


def train_tokenizer(texts: Iterable[str], kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a small tokenizer, for experiments that should not depend on a downloaded one.

    Args:
        texts (`Iterable[str]`): The texts to learn the vocabulary from.
        kind (`str`):
            `"char"` for characters; `"word"` for words and punctuation marks, with single spaces between them when decoded;
            `"bpe"` for byte-level byte-pair encoding, which loses nothing.
        vocab_size (`int`): The largest vocabulary, special tokens included.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`] with the special tokens `[PAD]`, `[BOS]`, `[EOS]` and `[UNK]`.
    """
    special_tokens = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    if vocab_size <= len(special_tokens):
        raise ValueError(f"`vocab_size` must be above {len(special_tokens)}, got {vocab_size}.")
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(special_tokens) + len(alphabet):
            raise ValueError(
                f"`vocab_size` must be at least {len(special_tokens) + len(alphabet)} for 'bpe', got {vocab_size}."
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        )
    elif kind in ("char", "word"):
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        if kind == "char":
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
            tokenizer.decoder = decoders.Fuse()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    else:
        raise ValueError(f"`kind` must be 'bpe', 'char' or 'word', got {kind!r}.")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Gives a tokenizer the BOS, EOS and PAD token that it lacks, as the paper does: BERT's `[CLS]` and `[SEP]` begin and
    end texts, and GPT-2 gets a new `[PAD]` (hence its 50258 tokens).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Changed in place.

    Returns:
        The tokenizer.
    """
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise ValueError("`tokenizer` has no tokens to begin and end texts: set its `bos_token` and `eos_token`.")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def pack_tokens(
    token_lists: Iterable[list[int]], block_size: int, bos_token_id: int, eos_token_id: int
) -> list[list[int]]:
    """
    Wrapped packing: appends EOS to every text, concatenates them, cuts the stream into stretches of `block_size - 2`
    tokens and puts BOS before and EOS after each. The remainder is dropped.

    Args:
        token_lists (`Iterable[list[int]]`): The tokens of each text.
        block_size (`int`): The length of the blocks, at least 3.
        bos_token_id (`int`): The token that begins a block.
        eos_token_id (`int`): The token that ends texts and blocks.

    Returns:
        `list[list[int]]`: blocks of `block_size` tokens.
    """
    stream = list(chain.from_iterable([*tokens, eos_token_id] for tokens in token_lists))
    inner = block_size - 2
    starts = range(0, len(stream) - inner + 1, inner)
    return [[bos_token_id, *stream[start : start + inner], eos_token_id] for start in starts]


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    return dataset.column_names or list(next(iter(dataset)))  # a stream may not know its columns


def find_text_column(dataset: Dataset | IterableDataset, text_column: str | None = None) -> str:
    """
    The column of a dataset that has the texts.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        text_column (`str`, *optional*): Its name: `"text"` if there is one, else the first column, unless given.

    Returns:
        `str`: the name, which is one of the columns.
    """
    columns = _column_names(dataset)
    if text_column is None:
        text_column = "text" if "text" in columns else columns[0]
    if text_column not in columns:
        raise ValueError(f"`text_column` is {text_column!r}, but the dataset has the columns {columns}.")
    return text_column


def pack_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str | None = None,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset of texts and packs them into blocks of equal length, see [`pack_tokens`]. `datasets` caches the
    result on disk.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A tokenizer with a BOS and an EOS token.
        block_size (`int`): The length of the blocks.
        text_column (`str`, *optional*): The column with the texts, see [`find_text_column`].
        num_proc (`int`, *optional*): The number of processes. Not for streams.
        batch_size (`int`, *optional*, defaults to 1000):
            How many texts are concatenated. Less than a block is lost for every so many texts.

    Returns:
        A dataset like `dataset` with the single column `input_ids`.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(
            "`tokenizer` needs a BOS and an EOS token to pack texts: pass it through `add_special_tokens` first."
        )
    if block_size < 3:
        raise ValueError(f"`block_size` must be at least 3, got {block_size}.")
    text_column = find_text_column(dataset, text_column)

    def tokenize_and_pack(batch: dict[str, list]) -> dict[str, list]:
        # `verbose`: a text may well be longer than a block.
        tokens = tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": pack_tokens(tokens, block_size, tokenizer.bos_token_id, tokenizer.eos_token_id)}

    options = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Tokenizing and packing"}
    packed = dataset.map(
        tokenize_and_pack, batched=True, batch_size=batch_size, remove_columns=_column_names(dataset), **options
    )
    if not isinstance(packed, IterableDataset) and len(packed) == 0:
        raise ValueError(f"The dataset has too few tokens for a single block: use a `block_size` below {block_size}.")
    return packed


@dataclass
class DataCollatorForFLM:
    """
    Makes batches of examples with `input_ids`. Shorter examples are padded on the right; then there is an
    `attention_mask`, and `labels` are -100 where it is 0.

    Args:
        pad_token_id (`int`, *optional*): The token to pad with; any will do, as it is not attended to.
    """

    pad_token_id: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        fills = {"input_ids": self.pad_token_id or 0, "attention_mask": 0, "labels": -100}
        columns = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in examples:
            ids = list(example["input_ids"])
            mask = list(example.get("attention_mask", [1] * len(ids)))
            labels = example.get("labels")
            if labels is None:
                labels = [token if real else -100 for token, real in zip(ids, mask)]
            for name, values in (("input_ids", ids), ("attention_mask", mask), ("labels", list(labels))):
                columns[name].append(values + [fills[name]] * (length - len(ids)))
        batch = {name: torch.tensor(rows) for name, rows in columns.items()}
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # nothing to mask: attention is faster without
        return batch
