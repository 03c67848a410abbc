"""The model that ships with the repository: its demo, and publishing and loading it."""

import json
import os
import re
import subprocess
import sys

import demo
import pytest
import torch
from example_scripts import run_elsewhere
from hub_server import TOKEN, metadata_problems
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from modeling_flm import FMLMModel
from modeling_flm.hub.publish import publish


LETTERS = re.compile(r"[a-z]+")

# Code of a user who has only torch and transformers installed
LOAD = """
import sys
sys.modules["modeling_flm"] = None
import torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained("tester/words", trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("tester/words", trust_remote_code=True)
tokens = model.generate(num_samples=5, pad_after_eos=True, generator=torch.Generator().manual_seed(0))
print(*tokenizer.batch_decode(tokens, skip_special_tokens=True), sep="\\n")
"""


@pytest.fixture(scope="module")
def model() -> FMLMModel:
    return FMLMModel.from_pretrained(demo.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.MODEL)


def test_it_is_small(model):
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) < 8e6


def test_words_look_like_english(model, tokenizer):
    words = demo.generate_words(model, tokenizer, num_samples=500, generator=torch.Generator().manual_seed(0))
    assert sum(LETTERS.fullmatch(word) is not None for word in words) >= 490
    assert len(set(words)) > 480
    # Vowels and consonants alternate as in English, unlike in random letters.
    assert sum(re.search(r"[aeiouy]", word) is not None for word in words) > 490
    assert sum(re.search(r"[^aeiouy]{5}|[aeiouy]{5}", word) is not None for word in words) < 25


@pytest.mark.parametrize("pattern", ["un...", "photo...", "______ness", "c_nt_____"])
def test_patterns(pattern, model, tokenizer):
    known = demo.known_tokens(pattern, 20, model.config.max_position_embeddings, tokenizer)
    words = demo.generate_words(model, tokenizer, **known, generator=torch.Generator().manual_seed(0))
    expected = re.compile(pattern.replace("...", "[a-z]*").replace("_", "[a-z]"))
    assert sum(expected.fullmatch(word) is not None for word in words) >= 19, words
    assert len(set(words)) > 10


def test_demo_prints_words():
    output = run_elsewhere("demo", "--num_samples", 6, "--patterns", "un...")
    assert "6 words, each in one forward pass" in output and len(re.findall(r"\bun[a-z]+", output)) > 6


@pytest.mark.slow
def test_published_and_loaded_elsewhere(model, tokenizer, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(demo.MODEL, "tester/words", token=TOKEN, license="apache-2.0", language="en")
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LOAD], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    tokens = model.generate(num_samples=5, pad_after_eos=True, generator=torch.Generator().manual_seed(0))
    assert process.stdout.splitlines() == tokenizer.batch_decode(tokens, skip_special_tokens=True)

    card = ModelCard(server.files("tester/words")["README.md"].decode())
    assert metadata_problems(card.content) == []
    evaluation = json.loads((demo.MODEL / "evaluation.json").read_text())
    assert {row["num_steps"] for row in evaluation["results"]} >= {1, 2, 4, 8}
    for row in evaluation["results"]:
        assert f"| {row['num_steps']} | {row['gen_ppl']:.2f} | {row['entropy']:.3f} |" in card.text
    assert "words of English" in card.text and "for which the model was trained" in card.text
