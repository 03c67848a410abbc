# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Texts in files: each process writes its own, whole after every batch, and an interrupted run goes on with what is there."""

import json
import os
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


# How many rows of a parquet file are in memory when it is written.
_ROW_GROUP = 10_000


class TextShards:
    """
    The files of a generation.

    Rows are written as lines of JSON, a batch at a time, and become a parquet file once a process has finished, where that is
    asked for. One process writes the file that `output` names; of several, each writes one with its number, such as
    `samples-00003.jsonl`. Beside them, `samples.settings.json` says what the texts were made with.

    Args:
        output (`str` or `Path`): A .jsonl or .parquet file.
        process_index (`int`, *optional*, defaults to 0): Which process this is.
        num_processes (`int`, *optional*, defaults to 1): How many there are.
    """

    def __init__(self, output: str | Path, process_index: int = 0, num_processes: int = 1):
        self.output = Path(output)
        number = f"-{process_index:05}" if num_processes > 1 else ""
        self.path = self.output.with_name(f"{self.output.stem}{number}{self.output.suffix}")
        self.lines_path = self.path.with_suffix(".jsonl")
        self.settings_path = self.output.with_name(f"{self.output.stem}.settings.json")
        self.pattern = self.output.with_name(f"{self.output.stem}{'-*' if number else ''}{self.output.suffix}")

    def files(self) -> list[Path]:
        """What there is on this machine, of any number of processes."""
        name = re.compile(re.escape(self.output.stem) + r"(-\d{5})?")
        suffixes = (".jsonl", self.output.suffix)
        paths = self.output.parent.glob("*")
        return sorted(path for path in paths if path.suffix in suffixes and name.fullmatch(path.stem))

    def start(self, settings: dict[str, Any], resume: bool) -> set[int]:
        """
        The numbers of the texts that are there. Only one process of a machine may call it, before any writes.

        Args:
            settings (`dict[str, Any]`): What texts depend on.
            resume (`bool`): Whether to go on with what there is.

        Raises:
            `ValueError`: if there are files, and `resume` is not set, or they were made with other settings.
        """
        files = self.files()
        if files and not resume:
            raise ValueError(
                f"`output`: {files[0]} exists already; name another file, or add --resume to go on with what is there."
            )
        if not files:
            return set()
        if not self.settings_path.exists():
            raise ValueError(f"`resume`: {self.settings_path} is missing, so that {files[0]} cannot be gone on with.")
        before, now = json.loads(self.settings_path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
        if different := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            values = ", ".join(f"`{name}` was {before.get(name)!r} and is {now.get(name)!r}" for name in different)
            raise ValueError(f"`resume`: the texts in {files[0]} were made with other settings: {values}.")
        return set(chain.from_iterable(map(self._indices, files)))

    @staticmethod
    def _indices(path: Path) -> list[int]:
        if path.suffix == ".parquet":
            return pq.read_table(path, columns=["index"])["index"].to_pylist()
        indices, end = [], 0
        with path.open("r+b") as file:
            for line in file:
                if line.endswith(b"\n"):
                    indices.append(json.loads(line)["index"])
                    end += len(line)
            file.truncate(end)  # the half of a line that a killed process has left
        return indices

    def append(self, rows: list[dict[str, Any]], settings: dict[str, Any]):
        """
        Writes a batch.

        Args:
            rows (`list[dict[str, Any]]`): Its texts, each with its `index`.
            settings (`dict[str, Any]`): What they were made with, which is written with the first.
        """
        if not self.lines_path.exists():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._replace(self.settings_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.lines_path.open(
            "ab", buffering=0
        ) as file:  # in one system call, which an interruption does not halve
            file.write(lines.encode())

    def _replace(self, path: Path, text: str):
        # Other processes may be writing the same.
        temporary = path.with_name(f"{path.name}.{self.path.stem}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def finish(self):
        """Makes the lines of this process a parquet file, if it is to be one."""
        if self.path != self.lines_path and self.lines_path.exists():
            self._to_parquet(self.lines_path)

    def finish_others(self):
        """
        The same for what other numbers of processes have left. Only one process of a machine may call it, when all have
        finished.
        """
        for path in self.files():
            if path.suffix != self.output.suffix:
                try:
                    self._to_parquet(path)
                except FileNotFoundError:  # another machine that has the same files was faster
                    continue

    def _to_parquet(self, lines_path: Path):
        path = lines_path.with_suffix(".parquet")
        temporary = path.with_name(f"{path.name}.{self.path.stem}.tmp")
        rows, writer = self._rows(lines_path, path), None
        while group := list(islice(rows, _ROW_GROUP)):
            table = pa.Table.from_pylist(group, schema=None if writer is None else writer.schema)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        writer.close()
        os.replace(temporary, path)
        lines_path.unlink(missing_ok=True)

    @staticmethod
    def _rows(lines_path: Path, parquet_path: Path) -> Iterator[dict[str, Any]]:
        """The rows of a parquet file that there may be already, and of the lines, each once."""
        seen = set()
        if parquet_path.exists():
            for batch in pq.ParquetFile(parquet_path).iter_batches():
                for row in batch.to_pylist():
                    seen.add(row["index"])
                    yield row
        with lines_path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["index"] not in seen:
                    seen.add(row["index"])
                    yield row
