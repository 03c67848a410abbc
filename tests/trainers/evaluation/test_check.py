"""The user's own test of a text: what it may return, and modules that cannot be imported."""

import re

import numpy as np
import pytest
import torch

from modeling_flm.trainers.evaluation import check_figures, load_check


async def coroutine(text):
    return False


def generator(text):
    yield False


class Instance:
    def __init__(self, text):
        pass


@pytest.mark.parametrize(
    "check, passed",
    [
        (str.isdigit, 0.5),
        (len, 0.5),
        (lambda text: float(len(text)), 0.5),
        (lambda text: np.bool_(text == "1"), 0.5),
        (lambda text: torch.tensor(text == "1"), 0.5),
        (re.compile("[0-9]").fullmatch, 0.5),
        (lambda text: None, 0),
    ],
)
def test_results(check, passed):
    assert check_figures([["1", ""]], check)[0]["passed"] == passed


@pytest.mark.parametrize(
    "check",
    [
        coroutine,
        generator,
        Instance,
        lambda text: (False, "too short"),
        lambda text: "False",
        lambda text: float("nan"),
        lambda text: np.array([False, False]),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_results_that_are_always_true_are_refused(check):
    with pytest.raises(ValueError, match="`check` .* for the text 'a'.* [Rr]eturn `"):
        check_figures([["a"]], check)


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("import nothing_here", "nothing_here"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_modules_that_fail(source, message, tmp_path):
    path = tmp_path / "checks.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=f"`check`: .*checks.py cannot be imported: .*{message}"):
        load_check(f"{path}:is_valid")


def test_functions_that_exit():
    with pytest.raises(ValueError, match="`check` failed for the text 'a': SystemExit: 3"):
        check_figures([["a"]], lambda text: exit(3))
