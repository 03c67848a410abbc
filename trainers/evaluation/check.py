# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The user's own test of a text, such as whether a database executes a query."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plots import share_interval


def load_check(name: str) -> Callable[[str], Any]:
    """
    Imports a function by name.

    Args:
        name (`str`):
            `"module:function"`, where the module is an installed one, one of the current folder, or a file such as `checks.py`.

    Returns:
        `Callable[[str], Any]`: the function, which has accepted a text.

    Raises:
        `ValueError`: if there is no such module or function, or if it fails for a text.
    """
    module_name, _, function_name = name.rpartition(":")
    if not module_name or not function_name:
        raise ValueError(f"`check` must be a module and a function, such as checks:is_valid, got {name!r}.")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")  # commands do not search the current folder, as `python` does
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.remove("")
    except (Exception, SystemExit) as error:  # the module may raise any
        raise ValueError(f"`check`: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"`check`: {module_name} has no function {function_name}.")
    _apply(function, "a text")
    return function


def check_figures(text_lists: Sequence[Sequence[str]], check: Callable[[str], Any]) -> list[dict[str, Any]]:
    """
    Returns columns for the row of each list of texts: the share of texts that pass a test, `passed`, and its 95 % interval
    (Wilson's), `passed_interval`.

    Args:
        text_lists (`Sequence[Sequence[str]]`): The texts of each row.
        check (`Callable[[str], Any]`): Returns `True` for a text that passes, else `False`; or a number, or what `re` finds.

    Example:

    ```python
    >>> from modeling_flm.trainers.evaluation import check_figures

    >>> check_figures([["12", "7", "x"]], str.isdigit)
    [{'passed': 0.6666666666666666, 'passed_interval': [0.20765..., 0.93851...]}]
    ```
    """
    figures = []
    for texts in text_lists:
        share = sum(_apply(check, text) for text in texts) / len(texts)
        figures.append({"passed": share, "passed_interval": list(share_interval(share, len(texts)))})
    return figures


def _apply(check: Callable[[str], Any], text: str) -> bool:
    try:
        result = check(text)
        result = result.item() if hasattr(result, "item") else result  # of numpy and torch
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"`check` failed for the text {text!r}: {type(error).__name__}: {error}. Return `False` for texts that do not pass."
        ) from error
    # Other objects are true whatever they say, such as coroutines, instances of a class, and `(False, "reason")`.
    if not isinstance(result, int | float | None | re.Match) or result != result:
        raise ValueError(f"`check` returned {result!r} for the text {text!r}: return `True` or `False`.")
    return bool(result)
