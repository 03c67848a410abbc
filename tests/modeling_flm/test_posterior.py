"""Posteriors: what is read of them a chunk at a time, against the dense one."""

import pytest
import torch
from tensors import seed

from modeling_flm.posterior_flm import Posterior


class TestPosterior:
    probabilities = torch.rand(3, 10, 7, generator=seed()).pow(3).softmax(-1)

    def posterior(self, probabilities=None, width=3) -> Posterior:
        dense = self.probabilities if probabilities is None else probabilities
        chunks = [slice(start, min(start + width, dense.shape[1])) for start in range(0, dense.shape[1], width)]
        return Posterior(lambda chunk: dense[:, chunk].clone(), chunks, dense.device)

    @pytest.mark.parametrize("width", [1, 3, 10])
    def test_readings_are_those_of_the_dense_one(self, width):
        posterior, embedding = self.posterior(width=width), torch.randn(7, 4)
        assert torch.equal(posterior.dense(), self.probabilities)
        assert torch.equal(posterior.argmax(), self.probabilities.argmax(-1))
        assert torch.equal(posterior.confidence(), self.probabilities.amax(-1))
        torch.testing.assert_close(posterior.mean(embedding), self.probabilities @ embedding)
        uniforms = torch.rand(3, 10)
        assert torch.equal(posterior.draw(uniforms), self.posterior(width=10).draw(uniforms))
        doubled = posterior.map(lambda part, chunk: 2 * part)
        torch.testing.assert_close(doubled.dense(), 2 * self.probabilities)
        weights = torch.rand(3, 10, 1)
        combined = posterior.combine(doubled, lambda one, two, chunk: one + weights[:, chunk] * two)
        torch.testing.assert_close(combined.dense(), self.probabilities * (1 + 2 * weights))

    def test_a_chunk_is_made_once_for_several_readings(self):
        made = []
        posterior = self.posterior().map(lambda part, chunk: made.append(chunk) or part)
        posterior.read(lambda part, chunk: part.sum(-1), lambda part, chunk: part.amax(-1))
        assert made == posterior.chunks

    def test_draws_have_the_distribution(self):
        probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(1, 20_000, -1)
        tokens = self.posterior(probabilities, 20_000).draw(torch.rand(1, 20_000, generator=seed()))
        counts = torch.bincount(tokens.flatten(), minlength=6).double()
        assert counts[[0, 2, 5]].sum() == 0
        expected = 20_000 * torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 18.4  # of 2 degrees of freedom: 1e-4

    def test_extreme_uniforms_draw_no_impossible_token(self):
        probabilities = torch.tensor([0.0, 0.3, 0.7, 0.0]).expand(1, 2, -1)
        for scale in (1.0, 0.3, 3.0):  # also where a combination does not sum to 1
            tokens = self.posterior(scale * probabilities).draw(torch.tensor([[0.0, 1 - 2**-24]]))
            assert tokens.tolist() == [[1, 2]]

    def test_what_leaves_the_simplex_counts_as_zero(self):
        probabilities = torch.tensor([-0.5, 0.6, -0.1, 1.0]).expand(1, 4000, -1)
        tokens = self.posterior(probabilities).draw(torch.rand(1, 4000, generator=seed()))
        assert set(tokens.unique().tolist()) == {1, 3}
        assert abs((tokens == 1).double().mean() - 0.6 / 1.6) < 4 * (0.25 / 4000) ** 0.5

    def test_of_tokens_is_certain(self):
        tokens = torch.tensor([[3, -100, 0]])
        dense = Posterior.of_tokens(tokens, 5, [slice(0, 2), slice(2, 3)]).dense()
        assert dense.argmax(-1).tolist() == [[3, 0, 0]] and torch.equal(dense.sum(-1), torch.ones(1, 3))
