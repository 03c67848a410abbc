import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from hub_server import LoopbackHub
from transformers import CompileConfig

from modeling_flm import FLMConfig, FLMModel, backbone_flm, losses, modeling_flm
from modeling_flm.joint_noise import JointNoise


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def connection_of_its_own(monkeypatch):
    """What transformers keeps of a connection to the Hub knows the Hub of the test in which it was first made."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


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


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that this process knows as the Hub."""
    with LoopbackHub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture(params=["whole", 1, 7, pytest.param("compiled", marks=pytest.mark.slow)])
def path(request, monkeypatch) -> str | int:
    """Ways to compute the same: all positions at once, chunks of 1 or 7 of them, and compiled."""
    if isinstance(request.param, int):

        def chunks(batch_size, length, vocab_size, device):
            return [slice(start, start + request.param) for start in range(0, length, request.param)]

        monkeypatch.setattr(losses, "chunks", chunks)
        monkeypatch.setattr(modeling_flm, "chunks", chunks)
        monkeypatch.setattr(backbone_flm, "chunks", chunks)
    return request.param


def sampling(path: str | int) -> dict[str, CompileConfig]:
    """The arguments of `generate` for one of these ways."""
    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    return {"compile_config": config} if path == "compiled" else {}


def two_time_denoiser(output) -> torch.Tensor:
    """The probabilities that `forward` returned, or what it returned the logarithms of."""
    return output.logits.softmax(-1) if output.probabilities is None else output.probabilities


def noise_factors(*embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The factors of the joint noise for all of its networks, differentiable in their embeddings."""
    noise = JointNoise(*embeddings)
    return tuple(noise.factor(index, embedding) for index, embedding in enumerate(embeddings))
