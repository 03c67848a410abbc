"""Samplers and commit rules: single steps without a network, one-hot states, and distributions against exact ones."""

import pytest
import torch
from exact_flows import ExactFlow, ExactFlowMap, assert_shares, chi_square
from small_models import build_flm, build_model
from tensors import seed

from modeling_flm import (
    BridgeSampler,
    BridgeSamplerConfig,
    FLMGenerationConfig,
    FlowMapSampler,
    FlowMapSamplerConfig,
    FMLMModel,
    FMLMTwoNetworkModel,
    StochasticFlowMapSampler,
    StochasticFlowMapSamplerConfig,
)
from modeling_flm.flow import bridge_coefficients
from modeling_flm.sampling_flm import BlockByBlock, PosteriorRefinement, load_sampler_config


SAMPLERS = [FlowMapSampler(), StochasticFlowMapSampler(0.6), BridgeSampler()]
BRIDGE = {"sampler_config": BridgeSamplerConfig()}


class TestStep:
    state, estimate, noise = torch.randn(3, 4, 5, 6, generator=seed()).unbind()

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("shape", [(4,), (4, 5)])
    def test_zero_interval_is_the_identity(self, sampler, shape):
        for time in (0.0, 0.3, 1.0):
            times = torch.full(shape, time)
            if time < 1 and isinstance(sampler, StochasticFlowMapSampler):
                continue  # it draws noise anew wherever there is some
            assert torch.equal(sampler.move(self.state, self.estimate, times, times, self.noise), self.state)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_one_shot_lands_on_the_estimate(self, sampler):
        zero, one = torch.zeros(4), torch.ones(4)
        torch.testing.assert_close(sampler.move(self.state, self.estimate, zero, one, self.noise), self.estimate)
        torch.testing.assert_close(sampler.move(self.state, self.estimate, zero + 0.9, one, self.noise), self.estimate)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_known_tokens_stay_where_they_are(self, sampler):
        known = torch.rand(4, 5, generator=seed()) < 0.5
        s, t = (torch.where(known, 1.0, time) for time in (0.2, 0.7))
        moved = sampler.move(self.state, self.estimate, s, t, self.noise)
        assert torch.equal(moved[known], self.state[known])
        alone = sampler.move(self.state, self.estimate, torch.full((4,), 0.2), torch.full((4,), 0.7), self.noise)
        assert torch.equal(moved[~known], alone[~known])

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_step_has_the_noise_that_its_time_asks_for(self, sampler):
        """From an exact estimate: the state at time t is as far from noise and text as the interpolant's."""
        text, start, noise = torch.randn(3, 1, 400_000, 1, dtype=torch.float64, generator=seed()).unbind()
        s, t = torch.full((1,), 0.3, dtype=torch.float64), torch.full((1,), 0.6, dtype=torch.float64)
        state = 0.7 * start + 0.3 * text
        moved = sampler.move(state, text, s, t, noise)
        share = (moved * text).mean() / (text * text).mean()
        rest = moved - 0.6 * text
        assert abs(share - 0.6) < 5e-3 and abs(rest.std() - 0.4) < 5e-3

    def test_bridge_composes(self):
        """From s to t by way of u, and at once: equal means and variances for a given text."""
        s, u, t = (torch.tensor([time], dtype=torch.float64) for time in (0.15, 0.4, 0.75))
        a1, b1, c1 = bridge_coefficients(s, u)
        a2, b2, c2 = bridge_coefficients(u, t)
        a, b, c = bridge_coefficients(s, t)
        torch.testing.assert_close(a1 * a2, a)
        torch.testing.assert_close(a2 * b1 + b2, b)
        torch.testing.assert_close((a2 * c1) ** 2 + c2**2, c**2)
        # The law of the interpolant is kept: mean t, variance (1 - t)^2
        torch.testing.assert_close(a * s + b, t)
        torch.testing.assert_close((a * (1 - s)) ** 2 + c**2, (1 - t) ** 2)


@pytest.mark.parametrize("vocab_size", [53, 20])
@pytest.mark.parametrize("num_steps", [1, 3, 16])
def test_embedding_space_sampler_equals_the_dense_sampler(vocab_size, num_steps):
    model = build_flm(vocab_size=vocab_size)
    prior = torch.randn(4, 12, vocab_size)

    # The paper's sampler: one-hot states, dense updates, Euler steps of dx/dt = (D_t(x) - x) / (1 - t).
    x = prior
    tau = torch.linspace(0, 1, num_steps + 1)
    t = model.time_map.tau_to_t(tau)
    embedding = model.embed_tokens.weight.detach()
    drafts = []
    for step in range(num_steps):
        with torch.no_grad():
            denoised = model(inputs_embeds=x @ embedding, timesteps=tau[step].expand(4)).logits.softmax(-1)
        drafts.append(denoised.argmax(-1))
        x = x + (t[step + 1] - t[step]) * (denoised - x) / (1 - t[step])
    output = model.generate(
        prior_state=prior @ embedding, num_steps=num_steps, return_dict_in_generate=True, output_drafts=True
    )
    assert torch.equal(output.sequences, x.argmax(-1))
    assert torch.equal(output.drafts, torch.stack(drafts, dim=1))
    assert output.num_forward_passes.eq(num_steps).all()


class TestGamma:
    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_new_flow_maps_draw_all_noise_anew(self, model_class, tmp_path):
        model = model_class.from_flm(build_model("flm")).eval()
        model.save_pretrained(tmp_path)
        for each in (model, model_class.from_pretrained(tmp_path)):
            assert each.generation_config.gamma == 1
            fresh = each.generate(num_samples=5, num_steps=3, generator=seed())
            assert torch.equal(each.generate(num_samples=5, num_steps=3, generator=seed(), gamma=1.0), fresh)
            assert not torch.equal(each.generate(num_samples=5, num_steps=3, generator=seed(), gamma=0), fresh)
        # Models that were saved without a gamma follow the flow, as before.
        (tmp_path / "generation_config.json").write_text('{"num_steps": 1}')
        old, options = model_class.from_pretrained(tmp_path), {"num_samples": 5, "num_steps": 3}
        assert torch.equal(
            old.generate(generator=seed(), **options), old.generate(generator=seed(), gamma=0, **options)
        )

    def test_gamma_zero_is_plain_sampling_and_batches_do_not_matter(self):
        model = build_model("fmlm")
        options = {"num_samples": 7, "num_steps": 4}
        plain = model.generate(generator=seed(), **options)
        assert torch.equal(model.generate(generator=seed(), gamma=0.0, **options), plain)
        fresh = model.generate(generator=seed(), gamma=0.7, **options)
        assert not torch.equal(fresh, plain)
        assert torch.equal(model.generate(generator=seed(), gamma=0.7, batch_size=2, **options), fresh)
        generators = [seed(n) for n in range(7)]
        fresh = model.generate(generator=generators, gamma=0.7, **options)
        assert torch.equal(model.generate(generator=[seed(3)], gamma=0.7, num_steps=4), fresh[3:4])

    @pytest.mark.parametrize("gamma", [0.0, 1.0])  # between them, only where delta is the text
    def test_gamma_keeps_the_distribution_of_an_exact_flow_map(self, gamma):
        texts, weights = [(0, 0), (0, 1), (1, 1)], (0.5, 0.2, 0.3)
        model = ExactFlowMap(texts, weights)
        tokens = model.generate(num_samples=1500, batch_size=1500, generator=seed(), num_steps=4, gamma=gamma)
        assert_shares(tokens, dict(zip(texts, weights)))


class TestDistribution:
    options = {"num_samples": 4000, "batch_size": 4000}

    @pytest.mark.parametrize("num_steps", [1, 3, 8])
    def test_bridge_is_exact_for_a_single_token(self, num_steps):
        texts, weights = [(n,) for n in range(4)], (0.4, 0.3, 0.2, 0.1)
        model = ExactFlow(texts, weights)
        tokens = model.generate(num_steps=num_steps, generator=seed(), **self.options, **BRIDGE)
        assert chi_square(tokens, texts, weights) < 21.1  # of 3 degrees of freedom: 1e-4
        if num_steps < 8:  # Euler's steps follow the flow only where they are short
            tokens = model.generate(num_steps=num_steps, generator=seed(), **self.options)
            assert chi_square(tokens, texts, weights) > 21.1

    @pytest.mark.parametrize("num_steps", [1, 3])
    def test_bridge_is_exact_for_the_last_unknown_token(self, num_steps):
        texts = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        weights = (0.25, 0.05, 0.1, 0.15, 0.02, 0.2, 0.13, 0.1)
        model = ExactFlow(texts, weights)
        tokens = model.generate(
            torch.tensor([[0, 0, 1]]), prompt_mask=torch.tensor([[1, 0, 1]]), num_steps=num_steps, generator=seed(),
            **self.options, **BRIDGE,
        )  # fmt: skip
        assert_shares(tokens, {(0, 0, 1): 0.05 / 0.2, (0, 1, 1): 0.15 / 0.2})

    def test_bridge_temperature_and_top_p_sharpen_what_is_drawn(self):
        """Of a single token, in one step: the distribution of the processed logits."""
        model = build_flm(vocab_size=8, hidden_size=16, max_position_embeddings=1)
        logits = model(inputs_embeds=torch.zeros(1, 1, 8) @ model.state_embedding, timesteps=torch.zeros(1)).logits
        state = torch.zeros(1, 1, 16)
        options = {"prior_state": state.expand(4000, -1, -1), "num_steps": 1, "batch_size": 4000, "generator": seed()}
        for temperature in (0.5, 2.0):
            tokens = model.generate(temperature=temperature, **options, **BRIDGE)
            expected = (logits[0, 0] / temperature).softmax(-1).tolist()
            assert_shares(tokens, {(token,): share for token, share in enumerate(expected)})
        tokens = model.generate(top_p=1e-6, **options, **BRIDGE)
        assert (tokens == logits.argmax()).all()

    def test_dependent_tokens_need_steps(self):
        """
        The texts "0 0" (70 %) and "1 1" (30 %): a single step of the bridge draws both tokens by themselves, and mixes the texts
        in 42 % of the samples. With four times the steps it does so less than a third as often. Euler's steps mix none, but
        in a single one all samples are the likelier text.
        """
        model = ExactFlow()
        mixed, first = {}, {}
        for name, options in (("bridge", BRIDGE), ("euler", {})):
            for num_steps in (1, 4, 16, 64):
                tokens = model.generate(num_steps=num_steps, generator=seed(), **self.options, **options)
                mixed[name, num_steps] = (tokens[:, 0] != tokens[:, 1]).double().mean().item()
                first[name, num_steps] = (tokens[:, 0] == 0).double().mean().item()
        error = 4 * (0.21 / 4000) ** 0.5
        assert abs(mixed["bridge", 1] - 2 * 0.7 * 0.3) < error
        for num_steps in (4, 16, 64):
            assert mixed["bridge", num_steps] < mixed["bridge", num_steps // 4] / 3
            assert abs(first["bridge", num_steps] - 0.7) < error
        assert first["euler", 1] == 1.0 and abs(first["euler", 64] - 0.7) < error
        assert mixed["euler", 64] == 0


class TestConfigs:
    def test_generation_config_keeps_its_sampler_config(self, tmp_path):
        for config in (FlowMapSamplerConfig(), StochasticFlowMapSamplerConfig(0.8), BridgeSamplerConfig()):
            FLMGenerationConfig(sampler_config=config).save_pretrained(tmp_path)
            loaded = FLMGenerationConfig.from_pretrained(tmp_path).sampler_config
            assert type(loaded) is type(config) and loaded == config

    def test_sampler_config_of_other_code_is_taken_by_its_name(self):
        """Code that comes with a model has classes of its own."""
        other = type("StochasticFlowMapSamplerConfig", (), {})()
        other.gamma = 0.3
        assert load_sampler_config(other) == StochasticFlowMapSamplerConfig(0.3)
        with pytest.raises(ValueError, match="`sampler_config` must be one of FlowMapSamplerConfig"):
            load_sampler_config({"_cls_name": "Euler"})
        with pytest.raises(ValueError, match="`gamma` must be a number in .0, 1., got 2"):
            StochasticFlowMapSamplerConfig(2)

    def test_gamma_is_short_for_a_sampler_and_what_is_said_last_counts(self):
        model = build_model("fmlm")
        options = {"num_samples": 5, "num_steps": 3}
        sample = lambda **more: model.generate(generator=seed(), **options, **more)  # noqa: E731
        plain, fresh, bridge = sample(), sample(gamma=0.7), sample(**BRIDGE)
        assert not torch.equal(plain, fresh) and not torch.equal(plain, bridge)
        assert torch.equal(sample(sampler_config=StochasticFlowMapSamplerConfig(0.7)), fresh)
        assert torch.equal(sample(sampler_config=StochasticFlowMapSamplerConfig(0.0)), plain)
        model.generation_config.gamma = 0.7
        assert torch.equal(sample(), fresh) and torch.equal(sample(**BRIDGE), bridge)
        assert torch.equal(sample(gamma=0.0), plain)
        model.generation_config.gamma, model.generation_config.sampler_config = None, BridgeSamplerConfig()
        assert torch.equal(sample(), bridge) and torch.equal(sample(gamma=0.7), fresh)
        assert torch.equal(sample(generation_config=FLMGenerationConfig(gamma=0.7)), fresh)

    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    def test_bridge_does_not_depend_on_batches_and_its_last_draft_is_the_text(self, kind):
        model = build_model(kind)
        options = {"num_samples": 7, "num_steps": 3, "output_drafts": True, "return_dict_in_generate": True, **BRIDGE}
        output = model.generate(generator=seed(), **options)
        assert torch.equal(output.drafts[:, -1], output.sequences)
        again = model.generate(generator=seed(), batch_size=2, **options)
        assert torch.equal(again.sequences, output.sequences) and torch.equal(again.drafts, output.drafts)
        assert not torch.equal(output.sequences, model.generate(generator=seed(1), **options).sequences)

    def test_bridge_goes_with_guidance(self):
        model, weak = build_model("flm"), build_model("flm", hidden_size=16)
        options = {"num_samples": 7, "num_steps": 3, **BRIDGE}
        plain = model.generate(generator=seed(), **options)
        guided = model.generate(generator=seed(), guidance_model=weak, guidance_scale=2.0, **options)
        assert not torch.equal(plain, guided)
        assert isinstance(FMLMModel.from_flm(model).generate(**options), torch.Tensor)


def positions(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


class TestCommitRules:
    probabilities = torch.tensor([[0.9, 0.2, 0.7, 0.7, 0.4, 0.1], [0.3, 0.3, 0.3, 0.8, 0.3, 0.3]])
    is_open = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()

    def chosen(self, round: int, **rule) -> list[list[int]]:
        return positions(PosteriorRefinement(**rule).commit(round, self.probabilities, self.is_open))

    def test_uniform_commit_budget_leaves_equally_many_to_each_round(self):
        assert self.chosen(0, num_rounds=4) == [[2, 3], [0, 3]]  # 5 and 6 tokens in 4 rounds: 2
        assert self.chosen(2, num_rounds=4) == [[2, 3, 4], [0, 1, 3]]  # in the 2 that are left
        assert self.chosen(3, num_rounds=4) == positions(self.is_open)

    def test_commit_threshold_and_commit_budget_are_both_enough(self):
        assert self.chosen(0, num_rounds=3, threshold=0.4, budget=0) == [[2, 3, 4], [3]]
        assert self.chosen(0, num_rounds=3, threshold=0.4, budget=2) == [[2, 3, 4], [0, 3]]
        assert self.chosen(0, num_rounds=3, threshold=0.99, budget=None) == [[], []]
        assert self.chosen(0, num_rounds=3, budget=100) == positions(self.is_open)

    def test_block_length(self):
        rule = BlockByBlock(block_length=4, length=6)
        assert rule.num_rounds == 2
        assert positions(rule.commit(0, self.probabilities, self.is_open)) == [[1, 2, 3], [0, 1, 2, 3]]
        assert positions(rule.due(1, self.is_open)) == [[4, 5], [4, 5]]
