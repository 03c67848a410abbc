"""Remote code in a virtual environment that has torch and transformers, and nothing of this project."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_flm import FMLMModel, FMLMTwoNetworkModel


@pytest.mark.slow
def test_generates_with_torch_and_transformers_alone(flm, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = Path(__file__).parents[1] / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "torch", "transformers"]
    subprocess.run(install, check=True)
    script = """
import importlib.util, sys, torch
from transformers import AutoModel
for name in ("modeling_flm", "trainers", "datasets", "accelerate"):
    assert importlib.util.find_spec(name) is None, name
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(0))
torch.save(tokens, sys.argv[1] + "/tokens.pt")
"""
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for model in (flm, FMLMModel.from_flm(flm).eval(), FMLMTwoNetworkModel.from_flm(flm).eval()):
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        subprocess.run([python, "-c", script, name], check=True, cwd=tmp_path, env=environment)
        expected = model.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.load(tmp_path / name / "tokens.pt"), expected)
