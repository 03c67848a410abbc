# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of texts from the Hub and from files."""

import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Builder of `datasets` for each file extension.
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
    text_column: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Loads a dataset from the Hub or from files, with a `train` and a `validation` split.

    Args:
        dataset_name (`str`, *optional*): Name or folder of a dataset.
        dataset_config_name (`str`, *optional*): Name of a configuration of the dataset.
        train_file (`str`, *optional*): A txt, json, jsonl, csv or parquet file for training.
        validation_file (`str`, *optional*): A file of the same type for evaluation.
        validation_percentage (`int`, *optional*, defaults to 5):
            Percentage of the training split that becomes the validation split if the dataset has none and none is named: a
            share of the texts, or the end of a single text. Not for streaming.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read texts during the training instead of before.
        sample_by (`str`, *optional*, defaults to `"line"`): Unit of text in txt files: line, paragraph or document.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the dataset. Datasets with a loading script have their tables on `refs/convert/parquet`.
        train_split (`str`, *optional*, defaults to `"train"`): Split for training, or a part of it, `"train[:-1000]"`.
        validation_split (`str`, *optional*): Split for evaluation. By default `"validation"`, if there is one.
        text_column (`str`, *optional*): Column of the texts, see [`find_text_column`].

    Returns:
        [`~datasets.DatasetDict`] or [`~datasets.IterableDatasetDict`]

    Raises:
        `FileNotFoundError`: if a file or dataset does not exist.
        `ValueError`: if neither or both of `dataset_name` and `train_file` are passed, or if a file has an unknown extension or
            cannot be read.
    """
    if dataset_name is None and train_file is None:
        raise ValueError("No texts to load: pass `dataset_name` or `train_file`.")
    if dataset_name is not None and train_file is not None:
        raise ValueError("Pass either `dataset_name` or `train_file`, and not both.")
    if dataset_name is not None:
        try:
            dataset = load_dataset(dataset_name, dataset_config_name, streaming=streaming, revision=dataset_revision)
        except OSError as error:
            raise FileNotFoundError(f"`dataset_name`: {error}") from error
    else:
        files = {"train": train_file, "validation": validation_file}
        files = {split: str(file) for split, file in files.items() if file is not None}
        extensions = {Path(file).suffix.lstrip(".") for file in files.values()}
        if len(extensions) != 1 or not extensions <= _BUILDERS.keys():
            *first, last = _BUILDERS
            names = (
                "`train_file` and `validation_file` must have the same type,"
                if len(files) > 1
                else "`train_file` must be"
            )
            raise ValueError(f"{names} a {', '.join(first)} or {last} file, got {' and '.join(files.values())}.")
        for split, file in files.items():
            if not Path(file).exists() and not re.search(r"[*?\[]|://", file):
                raise FileNotFoundError(f"`{split}_file`: there is no file {file}.")
            if Path(file).is_file() and Path(file).stat().st_size == 0:
                raise ValueError(f"`{split}_file`: {file} is empty.")
        builder = _BUILDERS[extensions.pop()]
        options = {"sample_by": sample_by} if builder == "text" else {}
        try:
            dataset = load_dataset(builder, data_files=files, streaming=streaming, **options)
        except DatasetGenerationError as error:
            cause = " ".join(str(error.__cause__ or error).split())
            names = " or ".join(f"`{split}_file`" for split in files)
            raise ValueError(f"{names}: {' or '.join(files.values())} cannot be read: {cause}") from error
    splits = {"train": train_split, "validation": validation_split}
    if validation_split is None and "validation" in dataset:
        splits["validation"] = "validation"
    splits = {
        name: _take_split(dataset, split, f"{name}_split") for name, split in splits.items() if split is not None
    }
    for split in splits.values():  # for the training record
        split.info.description = _source(dataset_name or train_file, dataset_config_name)
    if "validation" not in splits and not streaming and validation_percentage > 0:
        if len(splits["train"]) == 1:
            parts = _split_text(splits["train"], find_text_column(splits["train"], text_column), validation_percentage)
            splits["train"], splits["validation"] = parts
            logger.warning(
                f"There is a single text: its last {validation_percentage} % are kept for evaluation. To train on the whole text, "
                "pass a validation file or split, or separate texts, such as one per line."
            )
        else:
            parts = splits["train"].train_test_split(test_size=validation_percentage / 100, seed=0)
            splits["train"], splits["validation"] = parts["train"], parts["test"]
    return type(dataset)(splits)


def _split_text(dataset: Dataset, column: str, percentage: float) -> tuple[Dataset, Dataset]:
    """Splits the single text of a dataset into its start and its end, at a space."""
    text = dataset[0][column]
    place = round(len(text) * (1 - percentage / 100))
    space = re.compile(r"\s+(?=\S)").search(text, place)
    before, after = (place, place) if space is None else space.span()
    bounds = ({"start": 0, "stop": before}, {"start": after, "stop": len(text)})
    return tuple(dataset.map(_cut, fn_kwargs={"column": column, **each}) for each in bounds)


def _cut(row: dict[str, Any], column: str, start: int, stop: int) -> dict[str, str]:
    return {column: row[column][start:stop]}


def _source(name: str | Path, config_name: str | None) -> str:
    """Returns the name of a dataset, or of its local file or folder without the path."""
    name = Path(name).name if Path(name).exists() else str(name)
    return name if config_name is None else f"{name} ({config_name})"


def _take_split(dataset: DatasetDict | IterableDatasetDict, split: str, argument: str) -> Dataset | IterableDataset:
    """Returns a split such as "test", or a part of one such as "train[:-1000]"."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if match is None or match[1] not in dataset:
        raise ValueError(
            f"`{argument}`: the dataset has no split {split!r}: pass one of {list(dataset)}, or a part such as 'train[:-1000]'."
        )
    part = dataset[match[1]]
    if match[2] is None and match[3] is None:
        return part
    if isinstance(part, Dataset):
        num_rows = len(part)
    else:
        num_rows = part.info.splits[match[1]].num_examples if part.info.splits else None
        if num_rows is None and "-" in split:
            raise ValueError(f"`{argument}`: {split!r} counts from the end, but the length of the stream is unknown.")
    bounds = [None if bound is None else int(bound) for bound in match.groups()[1:]]
    start, stop, _ = slice(*bounds).indices(num_rows if num_rows is not None else sys.maxsize)
    if start >= stop:
        raise ValueError(f"`{argument}`: {split!r} has no texts: the whole split has {num_rows}.")
    return part.skip(start).take(stop - start)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Returns the columns of a dataset, reading the first row of a stream without column names."""
    return dataset.column_names or list(next(iter(dataset)))


def find_text_column(dataset: Dataset | IterableDataset, text_column: str | None = None) -> str:
    """
    Finds the column of a dataset that has the texts.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The dataset.
        text_column (`str`, *optional*): Name of the column. By default `"text"`, or the only column of strings.

    Returns:
        `str`: the name of a column.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = "make one with `Dataset.from_dict({'text': texts})`."
        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            hint = f"pass one of its splits, such as `dataset[{next(iter(dataset))!r}]`."
        raise ValueError(f"`dataset` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`: {hint}")
    columns = column_names(dataset)
    texts = [name for name in columns if _may_have_texts(dataset, name)]
    if text_column is None:
        if "text" not in columns and len(texts) != 1:
            raise ValueError(f"Pass `text_column`, the column of the texts: the dataset has {columns}.")
        text_column = "text" if "text" in columns else texts[0]
    if text_column not in columns:
        raise ValueError(f"`text_column` is {text_column!r}, but the dataset has the columns {columns}.")
    if text_column not in texts:
        feature = dataset.features[text_column]
        raise ValueError(
            f"`text_column` is {text_column!r}, which has {feature} instead of strings. Columns of strings: {texts}."
        )
    return text_column


def _may_have_texts(dataset: Dataset | IterableDataset, column: str) -> bool:
    """Returns whether a column has strings, or an unknown type."""
    if dataset.features is None:
        return True
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
