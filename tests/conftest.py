import gc
import random
import sys

import grammar
import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from hub_server import LoopbackHub
from oracle import SCORER
from small_models import build_flm
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from modeling_flm import FLMModel, utils_flm
from modeling_flm.trainers import load_gen_ppl


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_collection_of_modules():
    """Every training collects garbage. That takes a third of its time here, unless loaded modules are left out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def connection_of_its_own(monkeypatch):
    """What transformers keeps of a connection to the Hub knows the Hub of the test in which it was first made."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


@pytest.fixture(autouse=True)
def output_of_transformers():
    """Commands that a test runs in this process set how much transformers prints."""
    verbosity, shows_progress = transformers.utils.logging.get_verbosity(), is_progress_bar_enabled()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    (enable_progress_bar if shows_progress else disable_progress_bar)()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of 300 stories of the quickstart."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(grammar.sample_story(rng) for _ in range(300)))
    return path


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


class CountedChunks(list):
    """Chunks that record how many there are each time they are read."""

    def __init__(self, slices: list[slice], counts: list[int]):
        super().__init__(slices)
        self.counts = counts

    def __iter__(self):
        self.counts.append(len(self))
        return super().__iter__()


@pytest.fixture(params=["whole", 1, 7, pytest.param("compiled", marks=pytest.mark.slow)])
def path(request, monkeypatch) -> str | int:
    """Ways to compute the same values: all positions at once, chunks of 1 or 7 positions, and compiled."""
    counts = []
    if isinstance(request.param, int):

        def chunks(batch_size, length, vocab_size, device):
            starts = range(0, length, request.param)
            return CountedChunks([slice(start, start + request.param) for start in starts], counts)

        readers = [module for module in sys.modules.values() if getattr(module, "chunks", None) is utils_flm.chunks]
        for module in readers:
            monkeypatch.setattr(module, "chunks", chunks)
    yield request.param
    assert not isinstance(request.param, int) or max(counts, default=0) > 1, "no test path read several chunks"


@pytest.fixture(scope="module")
def gen_ppl():
    """The metric with the tiny scorer."""
    metric = load_gen_ppl()
    return lambda texts, **options: metric.compute(predictions=texts, model_id=SCORER, device="cpu", **options)
