# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of texts from the Hub and from files."""

import codecs
import csv
import glob
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset_builder,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Builder of `datasets` for each file extension
_BUILDERS = {"txt": "text", "json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}

_READERS = {"TextConfig": "text", "JsonConfig": "json", "CsvConfig": "csv"}

# Extensions of compressed files, after the extension above
_COMPRESSIONS = ("gz", "bz2", "xz", "zst")

# Remedies for errors of the readers, by a pattern in their messages
_REMEDIES = {
    "can't decode": " Save it as UTF-8.",
    "fields in line|Length of header": " Rows need as many fields as the header, and texts with a delimiter need quotes.",
    "changed from object|document is empty": ' Write one object per line, such as {"text": "..."}.',
    "at least one example|BatchSize must be": " It has no texts.",
    "zstd not supported": " Run pip install modeling-flm[zstd].",
}


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
    prompt_column: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """
    Loads a dataset from the Hub or from files, with a `train` and a `validation` split.

    Args:
        dataset_name (`str`, *optional*): Name of a dataset on the Hub, or a folder, as for `train_file`.
        dataset_config_name (`str`, *optional*): Name of a configuration of the dataset.
        train_file (`str`, *optional*):
            A txt, json, jsonl, csv, tsv or parquet file for training, also compressed (`corpus.txt.gz`); or a folder of such files,
            or of a dataset that was saved by `save_to_disk`.
        validation_file (`str`, *optional*): A file or folder for evaluation.
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
        prompt_column (`str`, *optional*): Column of prompts, whose numbers are texts as well.

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
    if sample_by not in ("line", "paragraph", "document"):
        raise ValueError(f"`sample_by` must be line, paragraph or document, got {sample_by!r}.")
    if not 0 <= validation_percentage < 100:
        raise ValueError(f"`validation_percentage` must be at least 0 and below 100, got {validation_percentage}.")
    if dataset_revision is not None and (dataset_name is None or Path(dataset_name).is_dir()):
        # A local copy of a dataset takes the place of a recipe's, with the recipe's revision.
        logger.warning(f"`dataset_revision` is ignored: {dataset_name or train_file} is local, not on the Hub.")
    options = {
        "streaming": streaming,
        "text_column": text_column,
        "sample_by": sample_by,
        "prompt_column": prompt_column,
    }
    if dataset_name is not None:
        dataset = _load("dataset_name", dataset_name, dataset_config_name, dataset_revision, **options)
    else:
        dataset = _load("train_file", str(train_file), **options)
        if validation_file is not None:
            parts = _load("validation_file", str(validation_file), **options)
            dataset["validation"] = parts["validation" if "validation" in parts else "train"]
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
            try:
                parts = splits["train"].train_test_split(test_size=validation_percentage / 100, seed=0)
            except ValueError as error:
                raise ValueError(
                    f"`validation_percentage`: {validation_percentage} % of {len(splits['train'])} texts leave none to train on: pass "
                    "less."
                ) from error
            splits["train"], splits["validation"] = parts["train"], parts["test"]
    return type(dataset)(splits)


def is_text_file(path: str) -> bool:
    """Returns whether a path ends in txt, also compressed."""
    return _builder_name(path) == "text"


def _builder_name(path: str) -> str | None:
    """Returns the builder of `datasets` for a path, or `None` for an unknown extension."""
    *_, first, last = "", "", *path.lower().split(".")
    return _BUILDERS.get(first if last in _COMPRESSIONS else last)


def _load(
    argument: str,
    path: str,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    text_column: str | None = None,
    sample_by: str = "line",
    prompt_column: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Loads all splits of a file, a folder or a dataset of the Hub, which `argument` names."""
    is_folder, files = Path(path).is_dir(), _local_files(path)
    for file in files:
        if (problem := _describe_content(file)) is not None:
            raise ValueError(f"`{argument}`: {file} {problem}")
    if any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json")):
        try:
            saved = load_from_disk(path)
        except Exception as error:  # of any reader
            cause = " ".join(str(error).split())
            raise ValueError(
                f"`{argument}`: {path} cannot be read: {cause}. Save it again by `save_to_disk`."
            ) from error
        saved = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        if streaming:
            return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in saved.items()})
        return saved
    if is_folder and glob.has_magic(path):
        raise ValueError(f"`{argument}`: rename the folder {path}: `datasets` reads *, ? and [ as a pattern.")
    source = {"path": path, "name": config_name, "revision": revision}
    if argument != "dataset_name" and not is_folder:
        builder_name = _builder_name(path)
        if builder_name is None:
            *first, last = _BUILDERS
            raise ValueError(
                f"`{argument}` must be a {', '.join(first)} or {last} file, also compressed ({', '.join(_COMPRESSIONS)}), or a "
                f"folder, got {path}."
            )
        if not files and "://" not in path:
            raise FileNotFoundError(f"`{argument}`: there is no file {path}.")
        if Path(path).is_file() and Path(path).stat().st_size == 0:
            raise ValueError(f"`{argument}`: {path} is empty.")
        source = {"path": builder_name, "data_files": {"train": glob.escape(path) if Path(path).is_file() else path}}
    # `datasets` tells files apart by path and modification time only. The time of the last change cannot be set.
    stats = [(str(file), file.stat()) for file in files]
    states = [(name, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in stats]
    cache = Path(datasets.config.HF_DATASETS_CACHE, "local", Hasher.hash(states)) if files else None
    source["cache_dir"] = None if cache is None else str(cache)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header")  # the rest of a row would be lost
            if "data_files" in source:
                first = files[:1]
            else:
                config = None if is_folder and config_name is None else load_dataset_builder(**source).config
                texts = _folder_texts(path, files, source) if config is None else []
                if texts:
                    builder_name, first = _builder_name(texts[0].name), texts[:1]
                    source = {
                        "path": builder_name,
                        "data_files": {"train": [glob.escape(str(text)) for text in texts]},
                    }
                    source["cache_dir"] = str(cache)
                else:
                    config = config or load_dataset_builder(**source).config
                    builder_name = _READERS.get(type(config).__name__)
                    first = [Path(str(next(iter(config.data_files.values()))[0]))] if files else []
            options = _reader_options(builder_name, first, text_column, sample_by, prompt_column)
            builder = load_dataset_builder(**source, **options)
            if builder_name == "csv" and (streaming or not Path(builder.cache_dir).is_dir()):
                for file in files:
                    if _builder_name(file.name) == "csv":
                        _check_quotes(file, options["sep"])
            if streaming:
                if files:
                    _check_files(builder_name, builder, options)
                dataset = IterableDatasetDict(builder.as_streaming_dataset())
                if (
                    files and next(iter(next(iter(dataset.values()))), None) is None
                ):  # also shows whether it can be read
                    raise ValueError("it has no texts")
            else:
                try:
                    builder.download_and_prepare()
                except Exception:  # of any reader
                    if files:
                        _check_files(builder_name, builder, options, whole=True)
                    raise
                if builder.info.splits and not any(split.num_examples for split in builder.info.splits.values()):
                    raise ValueError("it has no texts")
                dataset = builder.as_dataset()
    except Exception as error:  # of any reader
        if isinstance(error, FileNotFoundError) and is_folder:
            raise FileNotFoundError(f"`{argument}`: the folder {path} has no {', '.join(_BUILDERS)} files.") from error
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and not files):
            raise FileNotFoundError(f"`{argument}`: {error}") from error
        cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        remedy = next((remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, cause)), "")
        raise ValueError(f"`{argument}`: {path} cannot be read: {cause}.{remedy}") from error
    if builder_name == "text" and any(_begins_with_bom(file) for file in files if not _is_plain(file)):
        # `datasets` has no encoding for compressed files.
        dataset = type(dataset)({name: part.map(_without_bom) for name, part in dataset.items()})
    return dataset


def _folder_texts(path: str, files: list[Path], source: dict[str, Any]) -> list[Path]:
    """
    Returns the files of texts in a folder if `datasets`, which goes by most endings and by words such as test in names, would read
    others or only some of them. Raises a `ValueError` if they have several types or splits.
    """
    try:
        found = load_dataset_builder(**source).config.data_files or {}
    except FileNotFoundError:
        found = {}
    hidden = (".", "__", "dataset_info")
    texts = [file for file in files if not any(part.startswith(hidden) for part in file.relative_to(path).parts)]
    texts = [file for file in texts if _builder_name(file.name) is not None]
    readme = Path(path, "README.md")
    chosen = readme.is_file() and "data_files" in readme.read_text(encoding="utf-8", errors="replace")
    read = {Path(str(file)).resolve() for part in found.values() for file in part}
    left_out = [file for file in texts if file.resolve() not in read]
    if not texts or chosen or len(read) == len(texts) and not left_out:
        return []
    if len({_builder_name(file.name) for file in texts}) == 1 and {*found} <= {"train"}:
        return texts
    names = ", ".join(file.name for file in left_out[:3])
    raise ValueError(
        f"{len(left_out)} of its {len(texts)} files would be left out ({names}): a folder needs files of one type, and a split (train, "
        "validation or test) in the names of all files or of none. Or pass a pattern such as 'folder/*.txt'"
    )


def _describe_content(file: Path) -> str | None:
    """Returns what is wrong with the content of a local file, judging by its start, or `None`."""
    with open(file, "rb") as opened:
        if opened.read(40) == b"version https://git-lfs.github.com/spec/":
            return "is a pointer of Git LFS and not the data: run git lfs pull."
    if _builder_name(file.name) in (None, "parquet"):
        return None
    try:
        with fsspec.open(str(file), "rb", compression="infer") as opened:
            start = np.frombuffer(opened.read(2**16), dtype=np.uint8)
    except Exception:  # of any compression: the reader has the message
        return None
    # In UTF-16 all NULs, or those of spaces and ends of lines, are first or second bytes. In UTF-32 half of all bytes are NULs.
    nulls = np.flatnonzero(start == 0)
    if len(nulls) >= 4 and (
        2 * len(nulls) >= len(start) - 1 or len(nulls) > len(start) / 50 and np.ptp(nulls % 2) == 0
    ):
        return (
            "has NUL bytes, as in UTF-16 or UTF-32, or after a write that failed: save it as UTF-8, for example by iconv -f UTF-16 -t "
            "UTF-8, or write it again."
        )
    return None


def _check_quotes(file: Path, delimiter: str):
    """Raises a `ValueError` for a quote that ends within a field: the reader would drop it, and join the rows before it."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with fsspec.open(
            str(file), "rt", encoding="utf-8-sig", errors="replace", newline="", compression="infer"
        ) as lines:
            rows, start = csv.reader(lines, delimiter=delimiter, strict=True), 1
            try:
                for _ in rows:
                    start = rows.line_num + 1
            except csv.Error:
                end = f" to {rows.line_num}" if rows.line_num > start else ""
                raise ValueError(
                    f"the quotes in line {start}{end} of {file.name} do not match: put a text with quotes in quotes, and write each "
                    'quote within it twice, as in "a ""b"" c"'
                ) from None
    finally:
        csv.field_size_limit(limit)


def _check_files(builder_name: str | None, builder: DatasetBuilder, options: dict[str, Any], whole: bool = False):
    """
    Raises a `ValueError` if local files of a dataset have different columns. With `whole`, to explain a failure, also if one has no
    texts or cannot be read, or if columns have another order or type.
    """
    files = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    first: dict[str, Any] = {}
    for file in files if builder_name is not None and len(files) > 1 else ():
        rows = load_dataset_builder(builder_name, data_files=glob.escape(file), **options).as_streaming_dataset()
        name = Path(file).name
        try:
            row = next(iter(rows["train"]), None)
            for _ in rows["train"].with_format("arrow").iter(batch_size=10_000) if whole else ():
                pass
        except Exception as error:  # of any reader
            raise ValueError(f"{name}: {error.__cause__ or error}") from None
        if row is None and whole and not first:  # `datasets` takes the types of columns from it
            raise ValueError(f"{name} has no texts: remove it")
        row, first = row or first, first or row or {}
        describe = _describe_columns if whole and row.keys() == first.keys() else sorted
        if describe(row) != describe(first):
            raise ValueError(
                f"{name} has the columns {', '.join(describe(row))}, and {Path(files[0]).name} has {', '.join(describe(first))}: all files "
                f"need the same columns{', in the same order and of the same types' if whole else ''}"
            )


def _describe_columns(row: dict[str, Any]) -> list[str]:
    return [f"{name} ({type(value).__name__})" for name, value in row.items()]


def _is_plain(file: Path) -> bool:
    return not file.name.lower().endswith(_COMPRESSIONS)


def _begins_with_bom(file: Path) -> bool:
    with fsspec.open(str(file), "rb", compression="infer") as opened:
        return opened.read(3) == codecs.BOM_UTF8


def _without_bom(row: dict[str, str]) -> dict[str, str]:
    return {"text": row["text"].removeprefix("\ufeff")}


def _local_files(path: str) -> list[Path]:
    """Returns the files that a local path, or a pattern of paths, stands for."""
    if "://" in path:
        return []
    paths = [Path(path)] if Path(path).exists() else map(Path, glob.glob(path, recursive=True))
    files = [file for each in paths for file in (sorted(_walk(each)) if each.is_dir() else [each])]
    return [file for file in files if file.is_file()]


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder, also in linked folders, each of which is read once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (place := Path(root).resolve()) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        yield from (Path(root, name) for name in names)


def _reader_options(
    builder_name: str | None,
    files: list[Path],
    text_column: str | None,
    sample_by: str,
    prompt_column: str | None = None,
) -> dict[str, Any]:
    """Returns options of a reader, so that all texts are read as they stand in the file. `files` has the first one, if it is local."""
    if builder_name == "text":
        return {"sample_by": sample_by, "encoding": "utf-8-sig"}
    if builder_name == "json":
        return {"encoding": "utf-8-sig"}  # checked, unlike the default
    if builder_name != "csv":
        return {}
    # Words such as NA are texts, and a row with too many fields does not shift the others.
    options = {"keep_default_na": False, "na_values": [""], "index_col": False}
    column = text_column or "text"
    for file in files:
        with fsspec.open(str(file), "rt", encoding="utf-8-sig", errors="replace", compression="infer") as lines:
            header = lines.readline()
        delimiters = "\t,;|" if ".tsv" in file.name.lower() else ",;\t|"
        options["sep"] = next((each for each in delimiters if each in header), delimiters[0])
        (names,) = list(csv.reader([header], delimiter=options["sep"])) or [[]]
        if text_column is None and "text" not in names:
            if any(re.search(r"\S\s+\S|^[\d.]+$", name) for name in names):
                raise ValueError(
                    f"its first line, {header.strip()[:80]!r}, must have the names of the columns: add a line such as text, or pass "
                    "`text_column` if it has."
                )
            if len(names) == 1:
                (column,) = names
                logger.warning(f"{file.name}: the first line, {column!r}, is read as the name of the column of texts.")
        options["na_values"] = {
            name: [""] for name in names if name not in (column, prompt_column)
        }  # an empty text is a text
    return {**options, "converters": {column: str, prompt_column or column: str}}  # and so is a number


def _split_text(dataset: Dataset, column: str, percentage: float) -> tuple[Dataset, Dataset]:
    """Splits the single text of a dataset into its start and its end, at a space."""
    text = check_text(dataset[0][column], column)
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
    return dataset.column_names or list(next(iter(dataset), {}))


def find_text_column(
    dataset: Dataset | IterableDataset, text_column: str | None = None, argument: str = "text_column"
) -> str:
    """
    Finds the column of a dataset that has the texts.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The dataset.
        text_column (`str`, *optional*): Name of the column. By default `"text"`, or the only column of strings.
        argument (`str`, *optional*, defaults to `"text_column"`): Name of the argument, for messages.

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
        raise ValueError(f"`{argument}` is {text_column!r}, but the dataset has the columns {columns}.")
    if text_column not in texts:
        feature = dataset.features[text_column]
        found = "values of several types" if type(feature).__name__ == "Json" else feature
        raise ValueError(
            f"`{argument}` is {text_column!r}, which has {found} instead of strings. Columns of strings: {texts}."
        )
    return text_column


def check_text(text: Any, column: str, argument: str = "text_column") -> str:
    """Returns a text of a column. Raises a `ValueError` if it is no string."""
    if not isinstance(text, str):
        raise ValueError(
            f"`{argument}` {column!r} has {text!r}, which is not a string: remove such rows with "
            f"`dataset.filter(lambda row: isinstance(row[{column!r}], str))`."
        )
    return text


def _may_have_texts(dataset: Dataset | IterableDataset, column: str) -> bool:
    """Returns whether a column has strings, or an unknown type."""
    if dataset.features is None:
        return True
    feature = dataset.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")
