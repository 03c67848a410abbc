"""The same on a CUDA device."""

import pytest
import torch
from conftest import build_flm
from train_tiny import build

from modeling_flm import FMLMModel


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_logits(dtype, tolerance):
    model = FMLMModel.from_flm(build_flm()).eval()
    batch = [torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])]
    expected = model(*batch).logits
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        logits = model.cuda()(*(tensor.cuda() for tensor in batch)).logits
    assert logits.dtype == torch.float32
    assert (logits.cpu() - expected).abs().max() < tolerance * expected.abs().max()


def test_a_cpu_generator_gives_the_same_noise():
    model = build_flm()
    expected = model.generate(num_samples=8, num_steps=4, generator=torch.Generator().manual_seed(0))
    tokens = model.cuda().generate(num_samples=8, num_steps=4, generator=torch.Generator().manual_seed(0))
    assert tokens.is_cuda
    assert (tokens.cpu() == expected).float().mean() > 0.99  # but for near ties


def test_trains(tmp_path):
    trainer = build(tmp_path, max_steps=20, use_cpu=False, bf16=True)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
