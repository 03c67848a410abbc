"""Reads the fixtures: values of the paper's published code on tiny random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hub.convert import convert
from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel


FIXTURES = Path(__file__).parents[1] / "fixtures"
SCORER = str(FIXTURES / "scorer_tiny")


def values() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "values_tiny.safetensors")


def read_json(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text())


def flm() -> FLMModel:
    """The published tiny FLM."""
    return convert(FIXTURES / "flm_tiny.ckpt")


def fmlm() -> FMLMModel:
    """The published tiny flow map of the second stage."""
    return convert(FIXTURES / "fmlm_tiny.ckpt")


def two_network_fmlm() -> FMLMTwoNetworkModel:
    """The published tiny FLM with the correction network of the first stage."""
    return convert(FIXTURES / "flm_tiny.ckpt", correction=FIXTURES / "fmlm_stage1_tiny.ckpt")
