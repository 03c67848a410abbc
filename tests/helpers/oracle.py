"""Reads the fixtures: values of the paper's published code on tiny random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.hub.checkpoints import LightningCheckpoint
from modeling_flm.hub.convert import convert


FIXTURES = Path(__file__).parents[1] / "fixtures"
FLM, STAGE_1, STAGE_2 = (FIXTURES / f"{name}_tiny.ckpt" for name in ("flm", "fmlm_stage1", "fmlm"))
SCORER = str(FIXTURES / "scorer_tiny")


def values() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "values_tiny.safetensors")


def read_json(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text())


def flm() -> FLMModel:
    """The published tiny FLM."""
    return convert(FLM)


def fmlm() -> FMLMModel:
    """The published tiny flow map of the second stage."""
    return convert(STAGE_2)


def two_network_fmlm() -> FMLMTwoNetworkModel:
    """The published tiny FLM with the correction network of the first stage."""
    return convert(FLM, correction=STAGE_1)


def published(**changes) -> dict:
    """The content of a checkpoint as the published code writes it, of which tensors and settings can be changed."""
    checkpoint = LightningCheckpoint(STAGE_2)
    weights = {name: checkpoint.load(tensor) for name, tensor in checkpoint.content["state_dict"].items()}
    algorithm = changes.pop("algorithm", "flm_distill_double")
    config = {"algo": {"name": algorithm}, "model": {"n_heads": 3, "length": 12, **changes.pop("model", {})}}
    weights = {**weights, **changes}
    return {
        "state_dict": {name: tensor for name, tensor in weights.items() if tensor is not None},
        "hyper_parameters": {"config": config},
    }
