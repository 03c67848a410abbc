"""Checkpoints of small models from the later published code, and the values that it computes from them."""

import json

import oracle
from safetensors.torch import load_file


FOLDER = oracle.FIXTURES / "released"
VALUES = load_file(FOLDER / "values.safetensors")
SIZES = json.loads((FOLDER / "values.json").read_text())
