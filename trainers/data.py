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
"""From texts to batches: loading, packing, collation."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from modeling_flm.tokenization_flm import has_characters_only


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
    dataset_revision: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Loads a dataset of the Hub, or files, with a `train` and a `validation` split.

    Args:
        dataset_name (`str`, *optional*): Name of a dataset of the Hub, or a folder with one.
        dataset_config_name (`str`, *optional*): Name of a configuration of that dataset.
        train_file (`str`, *optional*): A txt, json, jsonl, csv or parquet file to train on.
        validation_file (`str`, *optional*): A file like it to evaluate on.
        validation_percentage (`int`, *optional*, defaults to 5):
            How much of the training split becomes the validation split where there is none and none is named. Not for
            streaming.
        streaming (`bool`, *optional*, defaults to `False`): Read while training instead of before.
        sample_by (`str`, *optional*, defaults to `"line"`): What a text is in txt files: line, paragraph or document.
        dataset_revision (`str`, *optional*):
            The branch, tag or commit of the dataset. What used to need a script has its tables on `refs/convert/parquet`.
        train_split (`str`, *optional*, defaults to `"train"`): The split to train on, or a part of it, `"train[:-1000]"`.
        validation_split (`str`, *optional*): The same to evaluate on. `"validation"`, if there is one, unless given.

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]

    Raises:
        `ValueError`: if neither or both of `dataset_name` and `train_file` are given, or a file has an unknown ending.
    """
    if (dataset_name is None) == (train_file is None):
        raise ValueError("Pass either `dataset_name` or `train_file`, and not both.")
    if dataset_name is not None:
        dataset = load_dataset(dataset_name, dataset_config_name, streaming=streaming, revision=dataset_revision)
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
    splits = {"train": train_split, "validation": validation_split}
    if validation_split is None and "validation" in dataset:
        splits["validation"] = "validation"
    splits = {name: _take_split(dataset, split) for name, split in splits.items() if split is not None}
    if "validation" not in splits and not streaming and validation_percentage > 0:
        parts = splits["train"].train_test_split(test_size=validation_percentage / 100, seed=0)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    return type(dataset)(splits)


def _take_split(dataset: DatasetDict | IterableDatasetDict, split: str) -> Dataset | IterableDataset:
    """A split such as "test", or a part of it such as "train[:-1000]", also of a stream."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if match is None or match[1] not in dataset:
        raise ValueError(
            f"The dataset has no split {split!r}: name one of {list(dataset)}, or a part, 'train[:-1000]'."
        )
    part = dataset[match[1]]
    if match[2] is None and match[3] is None:
        return part
    if isinstance(part, Dataset):
        num_rows = len(part)
    else:
        num_rows = part.info.splits[match[1]].num_examples if part.info.splits else None
        if num_rows is None and "-" in split:
            raise ValueError(f"{split!r} counts from the end, but how long the stream is is not known.")
    bounds = [None if bound is None else int(bound) for bound in match.groups()[1:]]
    start, stop, _ = slice(*bounds).indices(num_rows if num_rows is not None else sys.maxsize)
    if start >= stop:
        raise ValueError(f"{split!r} has no texts: the whole split has {num_rows}.")
    return part.skip(start).take(stop - start)


def pack_tokens(
    token_lists: Iterable[list[int]], block_size: int, bos_token_id: int | None, eos_token_id: int | None
) -> list[list[int]]:
    """
    Wrapped packing: appends EOS to every text, concatenates them, cuts the stream into stretches, and puts BOS before and
    EOS after each, which makes `block_size` tokens. The remainder is dropped.

    Args:
        token_lists (`Iterable[list[int]]`): The tokens of each text.
        block_size (`int`): The length of the blocks, at least 1 without BOS and EOS.
        bos_token_id (`int`, *optional*): The token that begins a block. Nothing marks beginnings if `None`.
        eos_token_id (`int`, *optional*): The token that ends texts and blocks. Nothing marks ends if `None`.

    Returns:
        `list[list[int]]`: blocks of `block_size` tokens.
    """
    begin, end = ([] if token is None else [token] for token in (bos_token_id, eos_token_id))
    stream = list(chain.from_iterable([*tokens, *end] for tokens in token_lists))
    inner = block_size - len(begin) - len(end)
    starts = range(0, len(stream) - inner + 1, inner)
    return [[*begin, *stream[start : start + inner], *end] for start in starts]


# What joins on again, in this order: addresses, what follows without a space, what precedes without one, and quotations.
_JOINS = [
    (re.compile(r"(https?) : / / "), r"\1://"),
    (re.compile(" / "), "/"),
    (re.compile(r" (?:([,;:](?= ))|([?!](?= |$))|('(?=\w)))"), r"\1\2\3"),
    (re.compile(r"(?<= )(\w+) \.(?= |$)"), r"\1."),
    (re.compile(r"([$£]) "), r"\1"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
]


def detokenize_lm1b(text: str) -> str:
    """
    Undoes, as the paper does, most of the tokenization that the texts of the One Billion Word benchmark come in.

    Args:
        text (`str`): A text such as `"He paid $ 5 , and left ."`.

    Returns:
        `str`: the text as one would write it.
    """
    for pattern, joined in _JOINS:
        text = pattern.sub(joined, text)
    return text


def _pieces(texts: list[str], size: int = 10_000) -> Iterator[str]:
    """Very long texts of characters, a stretch at a time: their encodings are a hundred times their size."""
    for text in texts:
        yield from (text[start : start + size] for start in range(0, len(text), size))


# What can happen to texts before they are tokenized.
PREPROCESSING = {"lm1b": lambda texts: map(detokenize_lm1b, texts), "characters": _pieces}


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
    preprocessing: str | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset of texts and packs them into blocks of equal length, see [`pack_tokens`]. `datasets` caches the
    result on disk.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a BOS and an EOS token, or of single characters and nothing else.
        block_size (`int`): The length of the blocks.
        text_column (`str`, *optional*): The column with the texts, see [`find_text_column`].
        num_proc (`int`, *optional*): The number of processes. Not for streams.
        batch_size (`int`, *optional*, defaults to 1000):
            How many texts are concatenated. Less than a block is lost for every so many texts.
        preprocessing (`str`, *optional*):
            `"lm1b"` for texts of the One Billion Word benchmark, see [`detokenize_lm1b`]; `"characters"` for a few very
            long texts and a tokenizer of characters.

    Returns:
        A dataset like `dataset` with the single column `input_ids`.
    """
    no_boundaries = tokenizer.bos_token_id is None or tokenizer.eos_token_id is None
    if no_boundaries and not has_characters_only(tokenizer):
        raise ValueError(
            "`tokenizer` needs a BOS and an EOS token to pack texts: pass it through `add_special_tokens` first."
        )
    if preprocessing is not None and preprocessing not in PREPROCESSING:
        raise ValueError(f"`preprocessing` must be one of {', '.join(PREPROCESSING)}, got {preprocessing!r}.")
    if preprocessing == "characters" and not has_characters_only(tokenizer):
        raise ValueError("`preprocessing='characters'` is for a `tokenizer` of single characters and nothing else.")
    if block_size < 3:
        raise ValueError(f"`block_size` must be at least 3, got {block_size}.")
    text_column = find_text_column(dataset, text_column)

    def tokenize_and_pack(batch: dict[str, list]) -> dict[str, list]:
        texts = batch[text_column]
        if preprocessing is not None:
            texts = list(PREPROCESSING[preprocessing](texts))
        # `verbose`: a text may well be longer than a block.
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
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
