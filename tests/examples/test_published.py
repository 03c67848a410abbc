"""`examples/published.py` and `make published`, on a local Hub with tiny models in the released layout."""

import json
import subprocess
from pathlib import Path

import oracle
import published
import pytest
from example_scripts import run_here
from hub_server import File, LoopbackHub, Repository
from huggingface_hub import constants
from places import ROOT

from modeling_flm.trainers import train_tokenizer


REPOSITORIES = ("FLM-B-LM1B", "FMLM-B-LM1B", "FLM-B-OWT", "FMLM-B-OWT")


def add_repository(server: LoopbackHub, name: str, folder: Path, **changes: bytes):
    files = {path.name: File(path.read_bytes()) for path in folder.iterdir()}
    files |= {filename: File(content) for filename, content in changes.items()}
    server.repositories[name] = Repository()
    server.repositories[name].commit("main", files, "first")


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> LoopbackHub:
    """A Hub with the released repositories at tiny size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    add_repository(server, "me/tokenizer", tmp_path / "tokenizer")
    for name in REPOSITORIES:
        folder = oracle.FIXTURES / "released" / ("fmlm_hub" if name.startswith("FMLM") else "flm_hub")
        content = json.loads((folder / "config.json").read_text())
        content["data"]["tokenizer_name_or_path"] = "me/tokenizer"
        add_repository(server, f"me/{name}", folder, **{"config.json": json.dumps(content).encode()})
    return server


def run(*arguments):
    run_here(published, "--quick", "--owner", "me", *arguments)


def test_two_models_beside_their_published_figures(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "QUICK_SAMPLES", 4)
    monkeypatch.setattr(published, "QUICK_STEPS", 8)
    scorer = oracle.FIXTURES / "scorer_tiny"
    arguments = ["--models", "flm_owt", "fmlm_lm1b", "--scorer", scorer]
    run(*arguments)
    printed = capsys.readouterr().out
    output = tmp_path / "outputs"
    tables = (output / "published.md").read_text()
    assert "from 4 samples" in printed
    rows = 0
    for name, gamma in (("flm_owt", 0.0), ("fmlm_lm1b", 0.8)):
        evaluation = json.loads((output / f"evaluation_{name}_quick" / "results.json").read_text())
        assert evaluation["sampling"]["protocol"] == "published" and evaluation["sampling"]["gamma"] == gamma
        assert evaluation["num_samples"] == 4 and evaluation["arguments"]["max_length"] == 12
        assert f"### {name}, gamma {gamma}, 4 samples under {scorer}" in tables
        assert f"### {name}, gamma {gamma}, 4 samples under {scorer}" in printed
        for row in evaluation["results"]:
            perplexity, entropy = published.PUBLISHED[name][row["num_steps"]]
            deviation = 100 * (row["gen_ppl"] - perplexity) / perplexity
            assert f"| {row['num_steps']} | {perplexity} | {row['gen_ppl']:.2f} (" in tables
            assert f") | {deviation:+.1f}% | {entropy} | {row['entropy']:.2f} |" in tables
            rows += 1
    assert rows == 1 + 4  # 8 steps; 1, 2, 4 and 8 steps
    # A second run repeats nothing, and needs no Hub.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run(*arguments)
    assert "converting" not in capsys.readouterr().out
    assert (output / "published.md").read_text() == tables


@pytest.mark.parametrize(
    "scorer, message",
    [
        (oracle.FIXTURES / "scorer_tiny", "error: me/FLM-B-LM1B: config.json is not in the cache, and the Hub"),
        ("gpt2-large", "error: --scorer: cannot load gpt2-large: the Hub cannot be reached"),
    ],
)
def test_no_network_is_one_line(scorer, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit, match=message) as error:
        run("--scorer", scorer)
    assert "\n" not in str(error.value)


def test_published_figures_are_in_the_docs():
    table = (ROOT / "docs" / "results.md").read_text()
    for rows in published.PUBLISHED.values():
        assert all(f"{perplexity:.2f} / {entropy:.2f}" in table for perplexity, entropy in rows.values())


def test_make_published():
    process = subprocess.run(["make", "-n", "published", "ARGS=--quick"], cwd=ROOT, capture_output=True, text=True)
    assert "examples/published.py --quick" in process.stdout
