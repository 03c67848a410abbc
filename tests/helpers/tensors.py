"""What many tests need of tensors: seeds, errors, factors of noise, and the size of chunks."""

import torch

from modeling_flm import utils_flm
from modeling_flm.joint_noise import JointNoise


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, as a share of the largest value."""
    return ((value - expected).abs().max() / expected.abs().max()).item()


def noise_factors(*embeddings: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The factors of the joint noise for all of its networks, differentiable in their embeddings."""
    noise, no_tokens = JointNoise(*embeddings), torch.zeros(0, dtype=torch.long)
    return tuple(noise.factor_and_tokens(index, each, no_tokens)[0] for index, each in enumerate(embeddings))


def set_chunk(monkeypatch, num_positions: int, batch_size: int, vocab_size: int):
    """Has losses and samples take so many positions of a batch at a time."""
    monkeypatch.setitem(utils_flm.CHUNK_ELEMENTS, "cpu", num_positions * batch_size * vocab_size)
