"""Small models with random weights, and their predictions."""

import torch
from transformers import CompileConfig

from modeling_flm import FLMConfig, FLMModel, FMLMModel, FMLMTwoNetworkModel


def without_zeros(model):
    """The model, with no weight left at its zero initialization."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def build_flm(**overrides) -> FLMModel:
    """A small FLM in evaluation mode, with no weight left at its zero initialization."""
    options = {
        "vocab_size": 53,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conditioning_size": 16,
        "max_position_embeddings": 12,
        **overrides,
    }
    return without_zeros(FLMModel(FLMConfig(**options)).eval())


def build_model(kind: str, **options):
    """
    A small "flm", "fmlm" or "two_network" model, in evaluation mode, with no weight left at zero either. It follows the flow:
    tests pass the gamma that they are about.
    """
    flm = build_flm(**options)
    if kind == "flm":
        return flm
    model_class = {"fmlm": FMLMModel, "two_network": FMLMTwoNetworkModel}[kind]
    model = without_zeros(model_class.from_flm(flm).eval())
    model.generation_config.gamma = None
    return model


def two_time_denoiser(output) -> torch.Tensor:
    """Probabilities from the output of `forward`, which has these or logits."""
    return output.logits.softmax(-1) if output.probabilities is None else output.probabilities


def sampling(path: str | int) -> dict[str, CompileConfig]:
    """The arguments of `generate` for a `path` of conftest.py."""
    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    return {"compile_config": config} if path == "compiled" else {}
