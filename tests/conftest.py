import sys
from pathlib import Path

import pytest
import torch

from modeling_flm import FLMConfig, FLMModel


sys.path.insert(0, str(Path(__file__).parent / "scripts"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    model = FLMModel(FLMConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def flm() -> FLMModel:
    return build_flm()
