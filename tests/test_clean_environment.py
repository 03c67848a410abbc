"""Remote code in a virtual environment that has torch and transformers, and nothing of this project."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_generates_with_torch_and_transformers_alone(flm, tmp_path):
    flm.save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = Path(__file__).parents[1] / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "torch", "transformers"]
    subprocess.run(install, check=True)
    script = """
import importlib.util, torch
from transformers import AutoModel
for name in ("modeling_flm", "trainers", "datasets", "accelerate"):
    assert importlib.util.find_spec(name) is None, name
model = AutoModel.from_pretrained("model", trust_remote_code=True)
torch.save(model.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(0)), "tokens.pt")
"""
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path, env=environment)
    expected = flm.generate(num_samples=2, num_steps=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)
