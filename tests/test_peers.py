"""Other language models to compare with, against an exact distribution."""

import math
from types import SimpleNamespace

import pytest
import torch
from peers.masked_diffusion import ancestral_samples, masked_log_likelihood


class ExactMaskedModel:
    """What a masked diffusion model of a few texts over four tokens says if nothing is left to learn; the mask is the fifth."""

    texts = torch.tensor([[0, 0], [1, 1], [0, 3]])
    weights = torch.tensor([0.5, 0.3, 0.2])
    config = SimpleNamespace(vocab_size=5)
    device = torch.device("cpu")

    def __call__(self, tokens, timesteps):
        fits = ((tokens[:, None] == self.texts) | (tokens[:, None] == 4)).all(-1)  # (batch_size, num_texts)
        chances = torch.where(fits.any(1, keepdim=True), fits * self.weights, self.weights)
        one_hot = torch.nn.functional.one_hot(self.texts, 5).float()
        logits = torch.einsum("bn,nlv->blv", chances / chances.sum(1, keepdim=True), one_hot).log()
        return SimpleNamespace(logits=logits)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestMaskedDiffusion:
    def test_bound_is_the_log_likelihood(self):
        """That of each text: every order of two tokens gives the same product of conditionals."""
        model = ExactMaskedModel()
        for text, weight in zip(model.texts, model.weights):
            bound = masked_log_likelihood(model, text.expand(4000, 2), num_times=32, generator=generator())
            assert bound.mean().item() == pytest.approx(math.log(weight), abs=4 * bound.std().item() / 4000**0.5)
            assert bound.std() < 1

    @pytest.mark.parametrize("num_steps", [1, 2, 8, 64])
    def test_ancestral_samples(self, num_steps):
        """Tokens that are written in the same step are independent: for each pair with probability 1 / num_steps."""
        model = ExactMaskedModel()
        tokens = ancestral_samples(model, 20_000, 2, num_steps, generator())
        first, second = torch.tensor([0.7, 0.3, 0, 0]), torch.tensor([0.5, 0.3, 0, 0.2])
        joint = torch.zeros(4, 4).index_put(tuple(model.texts.T), model.weights)
        expected = joint + (first[:, None] * second - joint) / num_steps
        shares = torch.zeros(4, 4).index_put(tuple(tokens.T), torch.tensor(1 / 20_000), accumulate=True)
        assert ((shares - expected).abs() < 4.5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-7).all()
