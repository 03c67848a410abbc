"""What the README and the pages of `docs/` and `examples/` show: Python, commands and links; and parsing commands without running them."""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command_parser
from places import ROOT


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a code span begins with if it is a command. Others are names, formulas and fragments.
_COMMAND = re.compile(r"(flm-[\w-]+|make|python -m|python (examples|benchmarks|docs)/|accelerate launch|pytest)\b")


class Parsed(Exception):
    """A command understood its arguments, and has done nothing yet."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks in a language, each moved down to the line on which it stands in the page."""
    text = page.read_text(encoding="utf-8")
    found = [match for match in _FENCE.finditer(text) if match[1] == language]
    return ["\n" * (text.count("\n", 0, match.start()) + 1) + match[2] for match in found]


def shell_commands(page: Path) -> list[str]:
    """Each command of the shell blocks, without comments and redirections."""
    commands = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            commands += [part for part in shlex.join(words).replace("'&&'", "&&").split(" && ") if part]
    return commands


def code_spans(page: Path) -> list[str]:
    """What stands between single backticks, on one line."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def inline_commands(page: Path) -> list[str]:
    """Code spans that are commands; they may leave out arguments that are required."""
    return [span for span in code_spans(page) if _COMMAND.match(span)]


def links(page: Path) -> list[tuple[Path, str]]:
    """Files of this repository that the page links to, and the headings in them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets = [target.partition("#") for target in targets if not target.startswith(("https://", "http://"))]
    return [((page.parent / path).resolve() if path else page, heading) for path, _, heading in targets]


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@contextmanager
def _stop_after_parsing(is_whole: bool) -> Iterator[None]:
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, args=None, namespace=None):
        for action in [] if is_whole else parser._actions:
            action.required = False
        namespace, unknown = original(parser, args, namespace)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args):
        yield


def _parse(function: Callable, words: list[str], is_whole: bool):
    """Calls a function that reads a command line, until it has read it."""
    with mock.patch.object(sys, "argv", words), _stop_after_parsing(is_whole):
        try:
            function()
        except Parsed:
            return
    raise AssertionError(f"{shlex.join(words)} does not parse its arguments")


def check_command(command: str, is_whole: bool = True):
    """
    Has the parser of the command read its arguments, from the folder of the repository.

    Args:
        command (`str`): The command, on one line.
        is_whole (`bool`, *optional*, defaults to `True`): Whether arguments that are required must be there.

    Raises:
        `SystemExit` or `AssertionError`: if the command, an argument, or a file of this repository that is named does not exist.
    """
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        del words[0]
    words = words[: words.index(">")] if ">" in words else words
    if words[-1] == "...":
        words, is_whole = words[:-1], False
    for word in words:
        if re.match(r"(examples|benchmarks|docs|tests|hub|trainers)/", word):
            path = word.partition(":")[0]  # of a function in a file
            assert (ROOT / path).exists(), f"{path} does not exist"
    program, arguments = words[0], words[1:]
    if program.startswith("flm-"):
        (entry_point,) = entry_points(group="console_scripts", name=program)
        _parse(entry_point.load(), words, is_whole)
    elif words[:3] == ["python3", "-m", "venv"] or program in ("source", "pytest"):
        pass
    elif words[:2] == ["python", "-m"]:
        main = import_module(words[2]).main
        _parse(main, words[2:], is_whole)
    elif program == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        # The check stops a script where it reads its arguments, so it must read all of them at once.
        assert "parse_known_args" not in source, f"{words[1]} reads its arguments in parts"
        if library := re.search(r"^from ([\w.]+) import .*\bmain$", source, re.MULTILINE):
            _parse(import_module(library[1]).main, words[1:], is_whole)
        elif "parse_args" not in source:
            assert len(words) == 2, f"{words[1]} takes no arguments"
        else:
            with mock.patch.object(sys, "path", [str((ROOT / words[1]).parent), *sys.path]):
                _parse(lambda: runpy.run_path(words[1], run_name="__main__"), words[1:], is_whole)
    elif words[:2] == ["accelerate", "launch"] and not is_whole and not re.search(r" -m |\.py\b", command):
        pass  # no script to check
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
        python = ["python", *(["-m"] if launch.module else []), launch.training_script]
        check_command(shlex.join([*python, *launch.training_script_args]), is_whole)
    elif program == "make":
        variables = dict(word.split("=", 1) for word in arguments if "=" in word)
        targets = [word for word in arguments if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        for target in targets:
            recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
            assert recipe, f"there is no target {target}"
            if variables:
                (script,) = re.findall(r"python (\S+) \$\(ARGS\)", recipe[1])
                check_command(f"python {script} {variables['ARGS']}", is_whole)
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[([\w,-]+)\]", command)
        known = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
        for extra in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{extra} =$", known, re.MULTILINE), f"there is no extra {extra}"
    else:
        raise AssertionError(f"{program} is not known")
