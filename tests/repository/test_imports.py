"""Imports go one way, examples → trainers → hub → modeling_flm, and remote code imports relatively."""

import ast
from configparser import ConfigParser
from pathlib import Path

import pytest
from places import ROOT

import modeling_flm.hub
import modeling_flm.trainers


# Folders and their import names
ROOMS = {"modeling_flm": "modeling_flm", "hub": "modeling_flm.hub", "trainers": "modeling_flm.trainers"}
# Files that transformers copies into a repository, together with the files that they import relatively
ENTRIES = {"modeling_flm.py", "configuration_flm.py", "pipeline_flm.py"}


def imported(path: Path) -> set[tuple[int, str]]:
    """The imports of a file: the number of leading dots and the name of the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
            if node.module == "modeling_flm":  # its subpackages may be imported from it
                found |= {(node.level, f"modeling_flm.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
    return found


def starts_with(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    later = list(ROOMS.values())[list(ROOMS).index(room) + 1 :]
    scripts = {path.stem for path in (ROOT / "examples").rglob("*.py")}
    for path in (ROOT / room).rglob("*.py"):
        depth = len(path.relative_to(ROOT / room).parts)
        for level, name in imported(path):
            assert level <= depth, f"{path}: {name} is in another room"
            assert level or not starts_with(name, *later, *scripts), f"{path}: {name}"


def test_the_other_rooms_are_imported_by_their_whole_names():
    for folder in (*ROOMS, "examples", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            found = {name for level, name in imported(path) if level == 0}
            assert not [name for name in found if starts_with(name, "hub", "trainers")], path


def test_every_folder_with_code_is_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = [path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    names = [
        "modeling_flm" if path.name == "modeling_flm" else ".".join(("modeling_flm", *path.relative_to(ROOT).parts))
        for path in folders
    ]
    assert sorted(setup["options"]["packages"].split()) == sorted(names)


@pytest.mark.parametrize("package", [modeling_flm, modeling_flm.hub, modeling_flm.trainers])
def test_what_is_tested_is_this_checkout(package):
    assert Path(package.__file__).resolve().parent == ROOT / package.__name__.rpartition(".")[2], "run `make install`"


def test_imports_of_remote_code_are_relative():
    folder = ROOT / "modeling_flm"
    copied, waiting = set(), set(ENTRIES)
    while waiting:
        name = waiting.pop()
        copied.add(name)
        found = imported(folder / name)
        assert not [module for level, module in found if level == 0 and starts_with(module, "modeling_flm")], name
        assert all(level <= 1 for level, _ in found)
        waiting |= {f"{module}.py" for level, module in found if level == 1} - copied
    assert not copied & {"rewards.py", "tokenization_flm.py", "__init__.py"}
    assert {path.name for path in folder.glob("*.py")} - copied == {"rewards.py", "tokenization_flm.py", "__init__.py"}
