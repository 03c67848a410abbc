import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from hub_server import LoopbackHub
from oracle import SCORER
from small_models import build_flm

from modeling_flm import FLMModel, backbone_flm, losses, modeling_flm
from modeling_flm.trainers import load_gen_ppl


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def connection_of_its_own(monkeypatch):
    """What transformers keeps of a connection to the Hub knows the Hub of the test in which it was first made."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


@pytest.fixture
def flm() -> FLMModel:
    return build_flm()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three texts and their times."""
    return {"input_ids": torch.randint(53, (3, 12)), "timesteps": torch.tensor([0.1, 0.5, 0.9])}


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


@pytest.fixture(scope="module")
def gen_ppl():
    """The metric with the tiny scorer."""
    metric = load_gen_ppl()
    return lambda texts, **options: metric.compute(predictions=texts, model_id=SCORER, device="cpu", **options)
