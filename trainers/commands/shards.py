# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Files of generated texts: one per process, valid after every batch, so that an interrupted run can be resumed."""

import json
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

from modeling_flm.utils_flm import describe_damage


class TextShards:
    """
    JSON-lines files of generated texts.

    A single process writes the file `output`. Each of several processes writes its own numbered file, such as
    `samples-00003.jsonl`. The settings of the generation are saved beside them, in `samples.settings.json`.

    Args:
        output (`str` or `Path`): A .jsonl file.
        process_index (`int`, *optional*, defaults to 0): Index of this process.
        num_processes (`int`, *optional*, defaults to 1): Number of processes.
    """

    def __init__(self, output: str | Path, process_index: int = 0, num_processes: int = 1):
        self.output = Path(output)
        number = f"-{process_index:05}" if num_processes > 1 else ""
        self.path = self.output.with_name(f"{self.output.stem}{number}{self.output.suffix}")
        self.settings_path = self.output.with_name(f"{self.output.stem}.settings.json")
        self.pattern = self.output.with_name(f"{self.output.stem}{'-*' if number else ''}{self.output.suffix}")

    def files(self) -> list[Path]:
        """Existing files on this machine, of any number of processes."""
        name = re.compile(re.escape(self.output.stem) + r"(-\d{5})?")
        paths = self.output.parent.glob(f"*{self.output.suffix}")
        return sorted(path for path in paths if name.fullmatch(path.stem))

    def start(self, settings: dict[str, Any], resume: bool) -> set[int]:
        """
        Returns the indices of existing texts. Only one process of a machine may call it, before any of them writes.

        Args:
            settings (`dict[str, Any]`): The settings that texts depend on.
            resume (`bool`): Whether to continue existing files.

        Raises:
            `ValueError`: if files exist, and `resume` is not set, or their settings differ, or they are damaged.
        """
        files = self.files()
        if files and not resume:
            raise ValueError(
                f"`output`: {files[0]} exists already; pass another file, or add --resume to continue this one."
            )
        if not files:
            return set()
        if not self.settings_path.exists():
            raise ValueError(f"`resume`: {self.settings_path} is missing, so {files[0]} cannot be resumed.")
        if (damage := describe_damage(self.settings_path)) is not None:
            raise ValueError(f"`resume`: {damage}")
        before, now = json.loads(self.settings_path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
        if different := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            values = ", ".join(f"`{name}` was {before.get(name)!r} and is {now.get(name)!r}" for name in different)
            raise ValueError(f"`resume`: the texts in {files[0]} have other settings: {values}.")
        return set(chain.from_iterable(map(self._read_indices, files)))

    @staticmethod
    def _read_indices(path: Path) -> list[int]:
        indices, end = [], 0
        with path.open("r+b") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    try:
                        indices.append(json.loads(line)["index"])
                    except (ValueError, KeyError, TypeError):
                        raise ValueError(
                            f"`resume`: line {number} of {path} is damaged: remove it, and its text is generated again."
                        ) from None
                    end += len(line)
            file.truncate(end)  # drop the incomplete last line of a killed process
        return indices

    def append(self, rows: list[dict[str, Any]], settings: dict[str, Any]):
        """
        Writes a batch.

        Args:
            rows (`list[dict[str, Any]]`): The texts, each with its `index`.
            settings (`dict[str, Any]`): The settings that texts depend on, saved with the first batch.
        """
        if not self.path.exists():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            # Replaced in one step, because other processes may write the same file.
            temporary = self.settings_path.with_name(f"{self.settings_path.name}.{self.path.stem}.tmp")
            temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, self.settings_path)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:  # a single system call, which an interrupt cannot split
            file.write(lines.encode())
