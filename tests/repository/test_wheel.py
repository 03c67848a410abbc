"""The wheel in its own virtual environment, beside a project with packages called `trainers` and `hub`."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import transformers
from places import ROOT
from transformers import AutoTokenizer

from modeling_flm.trainers import generate_samples, train_tokenizer


pytestmark = pytest.mark.slow

ROOMS = {"modeling_flm": "modeling_flm", "hub": "modeling_flm/hub", "trainers": "modeling_flm/trainers"}

SCRIPT = """
import sys
from pathlib import Path
import hub, trainers
import modeling_flm
from modeling_flm import trainers as flm_trainers
from modeling_flm.hub import publish
from modeling_flm.hub.card import TEMPLATES
assert (trainers.OWNER, hub.OWNER) == ("the project", "the project")
for module in (modeling_flm, flm_trainers, publish):
    assert Path(module.__file__).is_relative_to(sys.prefix), module
assert flm_trainers.FLMTrainer.__module__ == "modeling_flm.trainers.flm_trainer"
assert (TEMPLATES / "model_card.md").is_file()
flm_trainers.load_gen_ppl()
"""

# Shows the help of several commands in one process, where packages are imported once.
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "-h"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, path
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources without leftovers of earlier builds."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", output, source]
    subprocess.run(command, check=True)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """The folder of commands in an environment with the wheel, and the dependencies of the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # .pth files in the added folder are not read, so the editable installation there is not found.
    (packages / "dependencies.pth").write_text(str(Path(transformers.__file__).parents[1]))
    install = ["install", "--quiet", "--no-deps", "--ignore-installed", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install], check=True)
    return folder / "bin"


@pytest.fixture
def project(tmp_path) -> Path:
    for name in ("trainers", "hub"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('OWNER = "the project"\n')
    (tmp_path / "main.py").write_text(SCRIPT)
    return tmp_path


def run(command: list, folder: Path, stderr: str | None = None) -> str:
    """Runs a command without this checkout. Returns its output and checks what it printed as `stderr`, if passed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [*map(str, command)], cwd=folder, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert stderr is None or process.stderr == stderr
    return process.stdout


def test_the_wheel_has_all_files_in_one_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for room, target in ROOMS.items():
        files = [path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {f"{target}/{path.relative_to(ROOT / room).as_posix()}" for path in files}
    assert names == expected and "modeling_flm/py.typed" in names


def test_beside_a_project_with_the_same_folders(bin_folder, project, flm):
    run([bin_folder / "python", "main.py"], project)

    flm.save_pretrained(project / "model")
    train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100).save_pretrained(project / "model")
    tokens = generate_samples(flm, [0, 1], seed=0, num_steps=2)
    texts = AutoTokenizer.from_pretrained(project / "model").batch_decode(tokens, skip_special_tokens=True)
    arguments = ["model", "--num_samples", 2, "--num_steps", 2, "--seed", 0, "--device", "cpu"]
    assert run([bin_folder / "flm-generate", *arguments], project).splitlines() == texts
    # `python -m` looks in the folder of the project first.
    module = [bin_folder / "python", "-m", "modeling_flm.trainers.commands.generate"]
    assert run([*module, *arguments], project).splitlines() == texts


def test_help_of_every_command_and_nothing_else(bin_folder, project):
    names = [entry.name for entry in entry_points(group="console_scripts") if entry.name.startswith("flm-")]
    output = run([bin_folder / "python", "-c", HELP, *(bin_folder / name for name in names)], project, stderr="")
    for name in names:
        assert f"\n    {name} " in output


def test_readme_with_the_wheel(bin_folder, tmp_path):
    """The README runs in a fresh interpreter that has the wheel, without this checkout."""
    for name in ("tests", "examples", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "outputs", "node_modules")
        )
    for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    where = run([bin_folder / "python", "-c", "import modeling_flm; print(modeling_flm.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(bin_folder.parent)
    test = "tests/repository/test_docs.py::test_readme_runs_in_a_fresh_interpreter"
    output = run([bin_folder / "python", "-m", "pytest", "-q", "-m", "slow", test], tmp_path)
    assert "1 passed" in output
