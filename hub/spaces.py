# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Assembles the page that runs a model in a browser, as a static Space."""

import re
from html import escape
from pathlib import Path

from huggingface_hub import RepoCard


PAGE = Path(__file__).parent / "space"
_FILES = ("index.html", "style.css", "app.js", "flow.js", "tokenizer.js", "README.md")


def assemble_space(output: str | Path, model: str, revision: str | None = None, about: str = ""):
    """
    Writes the page as the files of a static Space.

    Args:
        output (`str` or `Path`): Output folder. It is created if it does not exist.
        model (`str`): Model to run if the address of the page names none: a name on the Hub, or a folder relative to the page.
        revision (`str`, *optional*): Branch of the model on the Hub. Defaults to `"main"`.
        about (`str`, *optional*, defaults to `""`): What visitors should know about the model.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        text = (PAGE / name).read_text(encoding="utf-8")
        if name == "index.html":
            text = _with_metadata(text, "model", model)
            text = _with_metadata(text, "revision", revision or "main")
            text = _with_metadata(text, "about", about)
        (output / name).write_text(text, encoding="utf-8")
    if not model.startswith((".", "/")):
        card = RepoCard.load(output / "README.md")
        card.data.models = [model]
        card.save(output / "README.md")


def _with_metadata(page: str, name: str, value: str) -> str:
    """Sets the content of a `<meta>` element."""
    page, count = re.subn(rf'(?<=<meta name="{name}" content=")[^"]*', lambda _: escape(value), page)
    if count != 1:
        raise RuntimeError(f'The page must have one `<meta name="{name}">`, but has {count}.')
    return page
