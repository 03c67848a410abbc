"""`examples/published.py` and `make published`, on a Hub of the loopback interface with the released layout at tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import oracle
import published
import pytest
from example_scripts import run_here
from hub_server import File, LoopbackHub, Repository
from places import ROOT

from modeling_flm.trainers import train_tokenizer


REPOSITORIES = ("FLM-B-LM1B", "FMLM-B-LM1B", "FLM-B-OWT", "FMLM-B-OWT")


def add_repository(server: LoopbackHub, name: str, folder: Path, **changes: bytes):
    files = {path.name: File(path.read_bytes()) for path in folder.iterdir()}
    files |= {filename: File(content) for filename, content in changes.items()}
    server.repositories[name] = Repository()
    server.repositories[name].commit("main", files, "first")


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as server:
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        add_repository(server, "me/tokenizer", tmp_path / "tokenizer")
        for name in REPOSITORIES:
            folder = oracle.FIXTURES / "released" / ("fmlm_hub" if name.startswith("FMLM") else "flm_hub")
            content = json.loads((folder / "config.json").read_text())
            content["data"]["tokenizer_name_or_path"] = "me/tokenizer"
            add_repository(server, f"me/{name}", folder, **{"config.json": json.dumps(content).encode()})
        yield server


def run(tmp_path: Path, *arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples" / "published.py", "--quick", "--owner", "me", *arguments]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_models_beside_their_published_figures(hub, tmp_path):
    scorer = oracle.FIXTURES / "scorer_tiny"
    arguments = ["--models", "flm_owt", "fmlm_lm1b", "--scorer", scorer]
    process = run(tmp_path, *arguments, HF_ENDPOINT=hub.url)
    assert process.returncode == 0, process.stderr
    output = tmp_path / "outputs"
    tables = (output / "published.md").read_text()
    assert "32 texts say little" in process.stdout
    rows = 0
    for name, gamma in (("flm_owt", 0.0), ("fmlm_lm1b", 0.8)):
        evaluation = json.loads((output / f"evaluation_{name}_quick" / "results.json").read_text())
        assert evaluation["sampling"]["protocol"] == "published" and evaluation["sampling"]["gamma"] == gamma
        assert evaluation["num_samples"] == 32 and evaluation["arguments"]["max_length"] == 12
        assert f"### {name}, gamma {gamma}, 32 texts under {scorer}" in tables
        assert f"### {name}, gamma {gamma}, 32 texts under {scorer}" in process.stdout
        for row in evaluation["results"]:
            perplexity, entropy = published.PUBLISHED[name][row["num_steps"]]
            deviation = 100 * (row["gen_ppl"] - perplexity) / perplexity
            assert f"| {row['num_steps']} | {perplexity} | {row['gen_ppl']:.2f} (" in tables
            assert f") | {deviation:+.1f}% | {entropy} | {row['entropy']:.2f} |" in tables
            rows += 1
    assert rows == 3 + 6  # 8, 16 and 32 steps; 1 to 32
    # What is there is not done again, and needs no Hub.
    again = run(tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "converting" not in again.stdout
    assert (output / "published.md").read_text() == tables


def test_no_network_is_one_line(tmp_path):
    process = run(tmp_path, "--scorer", oracle.FIXTURES / "scorer_tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    # Before it there may be what torchao says of its kernels.
    assert process.stderr.splitlines()[-1].startswith(
        "error: me/FLM-B-LM1B: config.json is not in the cache, and the Hub"
    )


def test_scorer_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # and is set back
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    message = "gpt2-large, which scores the texts, cannot be loaded: the Hub cannot be reached"
    with pytest.raises(SystemExit, match=message) as error:
        run_here(published, "--quick", "--owner", "me")
    assert "\n" not in str(error.value)


def test_all_four_models_have_a_recipe_and_a_repository():
    names = {published.repository(name, "david3684").split("/")[1] for name in published.PUBLISHED}
    assert names == set(REPOSITORIES)
    for name, rows in published.PUBLISHED.items():
        recipe = (ROOT / "examples" / "recipes" / f"evaluation_{name}.yaml").read_text()
        assert f"num_steps: {list(rows)}" in recipe
        table = (ROOT / "docs" / "results.md").read_text()
        assert all(f"{perplexity:.2f} / {entropy:.2f}" in table for perplexity, entropy in rows.values())


def test_make_published():
    process = subprocess.run(["make", "-n", "published", "ARGS=--quick"], cwd=ROOT, capture_output=True, text=True)
    assert "examples/published.py --quick" in process.stdout
