"""The README and the pages of `docs/` and `examples/`: their Python runs as printed, and the commands, files and links that they show exist."""

import json
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import grammar
import pytest
from datasets import Dataset
from example_scripts import run_here
from markdown_pages import (
    PAGES,
    ROOT,
    blocks,
    check_command,
    code_spans,
    headings,
    inline_commands,
    links,
    shell_commands,
)

from modeling_flm.trainers import FLMTrainingArguments


each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
pages_with_python = [page for page in PAGES if blocks(page, "python")]

# Trainings are as printed except for their length.
MAX_STEPS, BATCH_SIZE = 2, 4
SHORT_TRAININGS = f"""
from modeling_flm.trainers import FLMTrainingArguments

check = FLMTrainingArguments.__post_init__

def shorten(args):
    args.max_steps, args.per_device_train_batch_size, args.use_cpu = {MAX_STEPS}, {BATCH_SIZE}, True
    check(args)

FLMTrainingArguments.__post_init__ = shorten
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A folder with the files that the pages need: models of `make quickstart` (hardly trained), and texts."""
    folder = tmp_path_factory.mktemp("pages")
    sizes = ["--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2]
    options = ["--max_steps", 2, "--distillation_steps", 2, "--num_samples", 2, "--batch_size", 8]
    run_here("quickstart", *sizes, *options, "--output_dir", folder / "outputs/quickstart")
    shutil.copytree(folder / "outputs/quickstart/flm", folder / "outputs/steering/weak")
    rng = random.Random(0)
    stories = [grammar.sample_story(rng) for _ in range(300)]
    (folder / "stories.txt").write_text("\n".join(stories) + "\n")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    for process in range(2):  # the files of two processes of `flm-generate`
        rows = {"index": [process, process + 2], "text": stories[process : process + 3 : 2]}
        Dataset.from_dict(rows).to_json(folder / f"samples-0000{process}.jsonl")
    return folder


@pytest.fixture
def folder(quickstart, tmp_path, monkeypatch) -> Path:
    """The working directory: a copy of that folder."""
    shutil.copytree(quickstart, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("page", pages_with_python, ids=[str(page.relative_to(ROOT)) for page in pages_with_python])
def test_python_blocks_run_in_order(page, folder, monkeypatch):
    code = blocks(page, "python")
    imported = set(re.findall(r"^(?:from|import) (\w+)", "\n".join(code), re.MULTILINE))
    if missing := sorted(name for name in imported if find_spec(name) is None):
        pytest.skip(f"{', '.join(missing)} is not installed")
    monkeypatch.setattr(FLMTrainingArguments, "__post_init__", FLMTrainingArguments.__post_init__)
    exec(SHORT_TRAININGS, {})
    names = {"__name__": "__main__"}
    for block in code:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.skipif(
    (ROOT / "setup.cfg").exists(), reason="test_wheel.py runs it with the wheel, in a copy of this folder"
)
def test_readme_runs_in_a_fresh_interpreter(folder):
    code = blocks(ROOT / "README.md", "python")
    # Blocks before it load models as remote code, in a process that has not imported this package.
    first = next(index for index, block in enumerate(code) if "import FLMTrainer" in block)
    code.insert(first, SHORT_TRAININGS)
    script = folder / "readme.py"
    script.write_text("\n".join(block.lstrip("\n") for block in code))
    run = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    assert (folder / "outputs/fmlm/tokenizer.json").is_file()


def test_readme_shows_the_whole_way():
    names = " ".join(blocks(ROOT / "README.md", "python"))
    for name in ("AutoModel", "pipeline", "FLMTrainer", "FMLMTrainer", "save_model", "from_flm"):
        assert name in names
    commands = {command.split()[0] for command in shell_commands(ROOT / "README.md")}
    assert {"flm-generate", "flm-evaluate", "flm-publish", "flm-convert", "make", "pip"} <= commands


@each_page
def test_commands_exist_with_their_flags(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in shell_commands(page):
        check_command(command)
    for command in inline_commands(page):
        check_command(command, is_whole=False)


@pytest.mark.parametrize(
    "command, problem",
    [
        ("flm-generate outputs/fmlm --number_of_samples 3", "number_of_samples"),
        ("flm-train --train_file corpus.txt --output_dirs out", "output_dirs"),
        ("flm-distill --preset single_stages --teacher t --output_dir out", "single_stages"),
        ("flm-evaluate --num_steps 1", "--output_dir"),
        ("python examples/quickstarts.py", "quickstarts.py"),
        ("python benchmarks/performance.py trains", "trains"),
        ("accelerate launch -m modeling_flm.trainers.commands.generate m --steps 2", "--steps"),
        ("make published ARGS=--fast", "--fast"),
        ("make quickstarts", "quickstarts"),
        ('pip install ".[evaluation]"', "evaluation"),
        ("flm-sample outputs/fmlm", ""),
    ],
)
def test_wrong_commands_are_noticed(command, problem, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, AssertionError, ValueError)) as error:
        check_command(command)
    assert problem in f"{error.value}{capsys.readouterr().err}"


@each_page
def test_files_and_links_exist(page):
    for path, heading in links(page):
        assert path.exists(), f"{path} does not exist"
        assert not heading or heading in headings(path), f"{path} has no heading {heading}"
    for span in code_spans(page):
        if re.fullmatch(r"(examples|benchmarks|docs|tests)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{span} does not exist"
