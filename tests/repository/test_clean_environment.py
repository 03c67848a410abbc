"""Published models in a virtual environment with torch and transformers only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN
from places import ROOT
from small_models import build_flm

from modeling_flm import FMLMModel, FMLMTwoNetworkModel, hub
from modeling_flm.trainers import train_tokenizer


pytestmark = pytest.mark.slow

SCRIPT = """
import importlib.util, sys, torch
from transformers import AutoModel, AutoTokenizer, pipeline
for name in ("modeling_flm", "datasets", "accelerate"):
    assert importlib.util.find_spec(name) is None, name
for name in sys.argv[1:]:
    generator = lambda: torch.Generator().manual_seed(0)
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    tokens = model.generate(num_samples=2, num_steps=4, generator=generator())
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    pipe = pipeline("text-generation", model=name, trust_remote_code=True)
    rows = pipe(num_samples=2, num_steps=4, generator=generator())
    assert [row["generated_text"] for row in rows] == tokenizer.batch_decode(tokens, skip_special_tokens=True)
    torch.save(tokens, name.split("/")[-1] + ".pt")
"""


def test_published_models_load_with_torch_and_transformers_alone(server, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch", "transformers"], check=True)

    flm = build_flm()
    tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", vocab_size=100)
    connection = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    expected = {}
    for model in (flm, FMLMModel.from_flm(flm).eval(), FMLMTwoNetworkModel.from_flm(flm).eval()):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if model is flm:  # by the command
            command = Path(sys.executable).with_name("flm-publish")
            publish = [command, "--model", tmp_path / name, "--repo-id", f"tester/{name}"]
            subprocess.run(publish, check=True, cwd=tmp_path, env={**os.environ, **connection})
        else:
            hub.publish.publish(tmp_path / name, f"tester/{name}", token=TOKEN)
        expected[name] = model.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(0))
    # From the Hub, from its cache, and from folders.
    elsewhere = {**connection, "PATH": "", "HF_HOME": str(tmp_path / "home")}
    for offline, prefix in (("0", "tester"), ("1", "tester"), ("1", str(tmp_path))):
        names = [f"{prefix}/{name}" for name in expected]
        environment = {**elsewhere, "HF_HUB_OFFLINE": offline}
        subprocess.run([python, "-c", SCRIPT, *names], check=True, cwd=tmp_path, env=environment)
        for name, tokens in expected.items():
            assert torch.equal(torch.load(tmp_path / f"{name}.pt"), tokens)
            (tmp_path / f"{name}.pt").unlink()


def test_old_transformers_is_named(flm, tmp_path):
    flm.save_pretrained(tmp_path / "model")
    old = tmp_path / "old"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", old, "transformers==4.57.1"]
    subprocess.run(install, check=True)
    script = "from transformers import AutoModel; AutoModel.from_pretrained('model', trust_remote_code=True)"
    environment = {**os.environ, "PYTHONPATH": str(old), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode != 0
    assert "transformers>=5.20" in process.stderr and "pip install --upgrade transformers" in process.stderr
