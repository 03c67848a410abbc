"""The rooms of the house: imports go one way, examples → trainers → hub → modeling_flm."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ROOMS = ["modeling_flm", "hub", "trainers", "examples"]
# What transformers copies into a repository: the file of a model's class, and what is imported relatively, and so on.
ENTRIES = {"modeling_flm.py", "configuration_flm.py", "pipeline_flm.py"}


def imported(path: Path) -> set[tuple[int, str]]:
    """What a file imports: the number of dots, and the name of the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    later = ROOMS[ROOMS.index(room) + 1 :]
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} if room != "examples" else set()
    for path in (ROOT / room).rglob("*.py"):
        roots = {name.split(".")[0] for level, name in imported(path) if level == 0}
        assert not roots & {*later, *scripts}, path


def test_imports_of_remote_code_are_relative():
    folder = ROOT / "modeling_flm"
    copied, waiting = set(), set(ENTRIES)
    while waiting:
        name = waiting.pop()
        copied.add(name)
        found = imported(folder / name)
        assert not {module.split(".")[0] for level, module in found if level == 0} & set(ROOMS), name
        assert all(level <= 1 for level, _ in found)
        waiting |= {f"{module}.py" for level, module in found if level == 1} - copied
    assert not copied & {"rewards.py", "tokenization_flm.py", "__init__.py"}
    assert {path.name for path in folder.glob("*.py")} - copied == {"rewards.py", "tokenization_flm.py", "__init__.py"}
