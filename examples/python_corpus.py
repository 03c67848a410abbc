# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Write a training corpus from the English text that ships with Python: its help topics and the docstrings of its standard library, one
JSON object with a `text` per line.

    python examples/python_corpus.py corpus.jsonl
"""

import argparse
import ast
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics


def docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and its functions."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="jsonl file to write")
    return parser


def main(args: argparse.Namespace):
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts))
    texts = [inspect.cleandoc(text) for text in topics.values()]
    for path in files:
        try:
            texts += [text for text in docstrings(path) if len(text) >= 80]
        except SyntaxError:  # lib2to3 has test files in Python 2
            continue
    texts = list(dict.fromkeys(texts))
    with args.output.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{args.output}: {len(texts):,} texts, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main(make_parser().parse_args())
