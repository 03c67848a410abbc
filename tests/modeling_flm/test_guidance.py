"""Guidance by a worse model, and by a reward."""

import copy
import math

import pytest
import torch
from dense_sampler import dense_delta, dense_sample
from exact_flows import ExactFlow, ExactFlowMap
from small_models import build_model
from tensors import seed
from torch import nn
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from modeling_flm.joint_noise import JointNoise


class TestAutoguidance:
    @pytest.mark.parametrize("kinds", [("flm", "flm"), ("fmlm", "flm"), ("fmlm", "fmlm"), ("flm", "two_network")])
    @pytest.mark.parametrize("num_steps", [1, 4])
    def test_guidance_scale_is_that_of_the_dense_formula(self, kinds, num_steps):
        strong, weak = build_model(kinds[0]), build_model(kinds[1], hidden_size=16)
        prior = torch.randn(6, 12, 53)

        def choose(x, tau_s, tau_t):
            delta, worse = (dense_delta(model, x, tau_s, tau_t) for model in (strong, weak))
            return delta + 1.5 * (delta - worse)

        expected = dense_sample(strong, prior, num_steps, choose)
        own, other = (prior @ model.state_embedding for model in (strong, weak))
        guidance = {"guidance_model": weak, "guidance_scale": 1.5, "prior_state": torch.cat([own, other], dim=-1)}
        tokens = strong.generate(num_steps=num_steps, **guidance)
        assert torch.equal(tokens, expected)
        assert not torch.equal(tokens, strong.generate(num_steps=num_steps, prior_state=own))

    def test_guidance_scale_zero_or_an_equal_model_changes_nothing(self):
        model, weak = build_model("flm"), build_model("flm", hidden_size=16)
        options = {"num_samples": 20, "num_steps": 4}
        plain = model.generate(generator=seed(), **options)
        assert torch.equal(model.generate(generator=seed(), guidance_model=weak, guidance_scale=0, **options), plain)
        for scale in (1.0, 50.0, -3.0):
            guided = {"guidance_model": copy.deepcopy(model), "guidance_scale": scale, **options}
            assert torch.equal(model.generate(generator=seed(), **guided), plain)
        assert not torch.equal(
            model.generate(generator=seed(), guidance_model=weak, guidance_scale=5, **options), plain
        )

    def test_both_see_the_same_noise(self):
        """The covariance of the drawn states equals the covariance of a single projected one-hot noise."""
        model, weak = build_model("flm", vocab_size=200), build_model("flm", vocab_size=200, hidden_size=16)
        states = []
        for network in (model, weak):
            encode = network.encode
            network.encode = lambda state, *args, encode=encode: states.append(state) or encode(state, *args)
        model.generate(num_samples=2000, batch_size=2000, num_steps=1, guidance_model=weak, guidance_scale=1.0)
        drawn = torch.cat(states, dim=-1).flatten(0, 1)
        embedding = torch.cat([model.state_embedding, weak.state_embedding], dim=1).detach()
        covariance = drawn.T @ drawn / len(drawn)
        expected = embedding.T @ embedding
        assert (covariance - expected).abs().max() < 6 * expected.diagonal().max() / len(drawn) ** 0.5

    def test_processors_bind_both(self):
        model, weak = build_model("flm"), build_model("flm")
        processor = LogitsProcessorList([SuppressTokensLogitsProcessor(list(range(30)))])
        options = {"guidance_model": weak, "guidance_scale": 30.0, "logits_processor": processor}
        assert (model.generate(num_samples=20, num_steps=3, **options) >= 30).all()


class TestReward:
    def test_moves_the_noise_as_in_one_hot_space(self):
        model = build_model("fmlm")
        prior, weights = torch.randn(5, 12, 53), torch.randn(12, 53)
        reward = lambda delta: (delta * weights).sum(dim=(1, 2)).sin()  # noqa: E731
        x, scale = prior, 3.0
        tau = torch.linspace(0, 1, 4)
        t = model.time_map.tau_to_t(tau)
        for step in range(3):
            x = x.detach().requires_grad_()
            tau_s, tau_t = tau[step].expand(5), tau[step + 1].expand(5)
            rewards = reward(dense_delta(model, x, tau_s, torch.ones(5) if step == 0 else tau_s))
            (gradient,) = torch.autograd.grad(rewards.sum(), x)
            x = x + scale * (1 - t[step]) * (t[step + 1] - t[step]) / t[step + 1] * gradient
            delta = dense_delta(model, x, tau_s, tau_t)
            share = (t[step + 1] - t[step]) / (1 - t[step])
            x = (1 - share) * x + share * delta
        options = {"prior_state": prior @ model.state_embedding, "num_steps": 3, "return_dict_in_generate": True}
        output = model.generate(reward=reward, reward_scale=scale, **options)
        assert torch.equal(output.sequences, delta.argmax(-1))
        assert output.num_forward_passes.eq(6).all()
        assert not torch.equal(output.sequences, model.generate(**options).sequences)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("scale", [-0.7, 0.7])
    def test_tilts_a_distribution_that_is_known(self, scale):
        """Two texts with 70 and 30 %, and the exact denoiser: the second has the reward 1, the first 0."""
        model = ExactFlow()
        tokens = model.generate(
            num_samples=4000, batch_size=4000, generator=seed(), num_steps=100,
            reward=lambda delta: delta[:, :, 1].mean(dim=1), reward_scale=scale,
        )  # fmt: skip
        assert (tokens[:, 0] == tokens[:, 1]).all()
        expected = 0.3 * math.exp(scale) / (0.7 + 0.3 * math.exp(scale))
        # The reward of the mean is not the mean of the factor: 0.02 for what is of second order.
        assert abs(tokens[:, 0].double().mean().item() - expected) < 4 * (0.25 / 4000) ** 0.5 + 0.02

    def test_tilts_an_exact_flow_map(self):
        """The exact flow map is a step function of the noise, without gradient: the gradient comes from its denoiser."""
        model = ExactFlowMap(num_steps=50)
        tokens = model.generate(
            num_samples=1500, batch_size=1500, generator=seed(), num_steps=16,
            reward=lambda delta: delta[:, :, 1].mean(dim=1), reward_scale=0.7,
        )  # fmt: skip
        expected = 0.3 * math.exp(0.7) / (0.7 + 0.3 * math.exp(0.7))
        assert abs(tokens[:, 0].double().mean().item() - expected) < 0.07  # 0.16 above what it is without

    def test_reward_scale_zero_is_plain_sampling(self):
        model = build_model("flm")
        options = {"num_samples": 9, "num_steps": 3}
        reward = lambda delta: delta[..., 3].sum(dim=1)  # noqa: E731
        plain = model.generate(generator=seed(), **options)
        assert torch.equal(model.generate(generator=seed(), reward=reward, reward_scale=0.0, **options), plain)
        batches = {"batch_size": 2, "reward": reward, "reward_scale": 500.0}
        tokens = model.generate(generator=seed(), **options, **batches)
        assert (tokens == 3).sum() > (plain == 3).sum()
        assert torch.equal(tokens, model.generate(generator=seed(), **options, **{**batches, "batch_size": 9}))

    def test_is_shown_what_is_given_as_it_is(self):
        model, seen = build_model("flm"), []
        input_ids = torch.randint(53, (2, 5))
        reward = lambda delta: seen.append(delta.detach()) or delta[..., 3].sum(dim=1)  # noqa: E731
        model.generate(input_ids, num_steps=2, reward=reward, reward_scale=1.0)
        for delta in seen:
            assert torch.equal(delta[:, :5], nn.functional.one_hot(input_ids, 53).float())


def test_saved_guidance_scale_and_reward_scale_are_for_calls_with_a_guide():
    model, weak = build_model("flm"), build_model("flm", hidden_size=16)
    plain, guided = (
        model.generate(num_steps=3, num_samples=4, generator=seed(), **options)
        for options in ({}, {"guidance_model": weak, "guidance_scale": 5.0})
    )
    model.generation_config.guidance_scale = 5.0
    model.generation_config.reward_scale = 5.0
    assert torch.equal(model.generate(num_steps=3, num_samples=4, generator=seed()), plain)
    assert torch.equal(model.generate(num_steps=3, num_samples=4, generator=seed(), guidance_model=weak), guided)


def test_states_of_equal_embeddings_are_one():
    model = build_model("flm", vocab_size=200)
    embedding = model.state_embedding.detach()
    assert JointNoise(embedding).size == 32
    calls = []
    encode = model.encode
    model.encode = lambda state, *args: calls.append(state.shape[-1]) or encode(state, *args)
    model.generate(num_steps=1, guidance_model=copy.deepcopy(build_model("flm", vocab_size=200)), guidance_scale=1.0)
    assert calls == [32]
