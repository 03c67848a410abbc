"""Exact flows of a few texts, and tests of the distribution of samples."""

import torch

from modeling_flm import FMLMConfig, FMLMModel


class ExactFlowMap(FMLMModel):
    """
    The flow map of a distribution of a few texts over a few tokens, by default "0 0" (70 %) and "1 1" (30 %). The embedding is the
    identity, so states are one-hot states. `num_steps` of Runge-Kutta: 100 differ from 1600 by at most 1e-6.
    """

    def __init__(self, texts=((0, 0), (1, 1)), weights=(0.7, 0.3), num_steps=100):
        vocab_size = 1 + max(max(text) for text in texts)
        sizes = {"vocab_size": vocab_size, "hidden_size": vocab_size, "num_attention_heads": 1, "num_hidden_layers": 1}
        super().__init__(FMLMConfig(**sizes, max_position_embeddings=len(texts[0])))
        self.generation_config.gamma = None  # an exact map has no errors that new noise would correct
        self.embed_tokens.weight.data = torch.eye(vocab_size)
        self.texts = torch.eye(vocab_size, dtype=torch.float64)[torch.tensor(texts)]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.num_steps = num_steps

    def denoiser(self, x, t):
        # log p(text | x) = log p(text) + sum of t <x, text> / (1 - t)^2 + const; known tokens leave only texts with them
        products = torch.einsum("blv,klv->bkl", x.double(), self.texts)
        t = (t[:, None] if t.dim() == 1 else t)[:, None].double()
        noisy = torch.where(t < 1, t / (1 - t).clamp(min=1e-30) ** 2 * products, (products - 1) * 1e9)
        logits = self.weights.log() + noisy.sum(-1)
        return torch.einsum("bk,klv->blv", logits.softmax(-1), self.texts)

    def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
        return hidden_states

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None):
        s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
        if torch.equal(s, t):
            return self.denoiser(state, s).to(state.dtype)
        # At 0.99 the text is certain, and the velocity still finite.
        t = torch.where(s < 1, t.clamp(max=0.99), t)
        axes = (slice(None),) * s.dim() + (None,) * (3 - s.dim())

        def velocity(x, time):  # known tokens do not move
            rest = (1 - time)[axes]
            return torch.where(rest > 0, (self.denoiser(x, time) - x) / rest, 0.0)

        x, num_steps = state, self.num_steps
        step = (t - s) / num_steps
        half = step[axes] / 2
        for n in range(num_steps):  # Runge-Kutta of order 4
            time = s + n * step
            k1 = velocity(x, time)
            k2 = velocity(x + half * k1, time + step / 2)
            k3 = velocity(x + half * k2, time + step / 2)
            k4 = velocity(x + 2 * half * k3, time + step)
            x = x + half / 3 * (k1 + 2 * k2 + 2 * k3 + k4)
        keep = ((1 - t) / (1 - s))[axes]
        return torch.where(s[axes] < 1, (x - keep * state) / (1 - keep), x).to(state.dtype)


class ExactFlow(ExactFlowMap):
    """The denoiser of these texts, as an FLM."""

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None):
        return self.denoiser(state, self.time_map.tau_to_t(tau_s)).to(state.dtype)


def assert_shares(tokens, weights):
    """Asserts that each text has the share `weights[text]` among the samples."""
    for text, weight in weights.items():
        share = (tokens == torch.tensor(text)).all(dim=1).double().mean().item()
        assert abs(share - weight) < 4 * (weight * (1 - weight) / len(tokens)) ** 0.5 + 0.005


def chi_square(tokens: torch.Tensor, texts, weights) -> float:
    """The chi-square statistic of the texts' counts. Infinite if there is a sample of another text."""
    counts = torch.tensor([(tokens == torch.tensor(text)).all(dim=1).sum() for text in texts]).double()
    expected = len(tokens) * torch.tensor(weights, dtype=torch.float64)
    return ((counts - expected) ** 2 / expected).sum().item() if counts.sum() == len(tokens) else float("inf")
