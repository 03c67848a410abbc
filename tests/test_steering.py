"""Steering: guidance, rewards, prompts and infills, fresh noise, texts of several lengths."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState, cpu_offload
from dense_sampler import dense_delta, dense_sample
from exact_flows import ExactFlow, ExactFlowMap, assert_shares
from processes import run_processes
from small_models import build_flm, build_model, sampling
from tensors import seed
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from modeling_flm import (
    BridgeSamplerConfig,
    ClassifierReward,
    FLMGenerationConfig,
    LanguageModelReward,
)
from modeling_flm.joint_noise import JointNoise
from trainers import generate_samples


def continue_prompts(indices: list[int]) -> torch.LongTensor:
    """The texts with these numbers, each with a prompt and a mask of its own."""
    torch.manual_seed(0)
    model, weak = build_model("fmlm"), build_model("flm", hidden_size=16)
    input_ids, prompt_mask = torch.randint(53, (7, 12)), torch.rand(7, 12) < 0.5
    return generate_samples(
        model, indices, seed=3, input_ids=input_ids[indices], prompt_mask=prompt_mask[indices], num_steps=3, gamma=0.5,
        guidance_model=weak, guidance_scale=2.0,
    )  # fmt: skip


def continue_some(output_dir: Path):
    """What one of several processes does."""
    state = PartialState(cpu=True)
    with state.split_between_processes(list(range(7))) as indices:
        torch.save(continue_prompts(indices), output_dir / f"{state.process_index}.pt")
    assert state.num_processes == 2


class TestAutoguidance:
    @pytest.mark.parametrize("kinds", [("flm", "flm"), ("fmlm", "flm"), ("fmlm", "fmlm"), ("flm", "two_network")])
    @pytest.mark.parametrize("num_steps", [1, 4])
    def test_equals_the_dense_formula(self, kinds, num_steps):
        strong, weak = build_model(kinds[0]), build_model(kinds[1], hidden_size=16)
        prior = torch.randn(6, 12, 53)

        def choose(x, tau_s, tau_t):
            delta, worse = (dense_delta(model, x, tau_s, tau_t) for model in (strong, weak))
            return delta + 1.5 * (delta - worse)

        expected = dense_sample(strong, prior, num_steps, choose)
        options = {"prior_state": prior, "num_steps": num_steps}
        tokens = strong.generate(guidance_model=weak, guidance_scale=1.5, **options)
        assert torch.equal(tokens, expected)
        assert not torch.equal(tokens, strong.generate(**options))

    def test_no_change_without_scale_or_by_an_equal_model(self):
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
        """By the covariance of the drawn states, against that of one noise in one-hot space."""
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
        options = {"prior_state": prior, "num_steps": 3, "return_dict_in_generate": True}
        output = model.generate(reward=reward, reward_scale=scale, **options)
        assert torch.equal(output.sequences, delta.argmax(-1))
        assert output.num_forward_passes.eq(6).all()
        assert not torch.equal(output.sequences, model.generate(**options).sequences)
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("scale", [-0.7, 0.7])
    def test_tilts_a_distribution_that_is_known(self, scale):
        """Two texts with 70 and 30 %, and the exact denoiser: the reward of the second is 1, that of the first 0."""
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
        """Which is a step function of the noise: its gradient says nothing, that of its denoiser does."""
        model = ExactFlowMap(num_steps=50)
        tokens = model.generate(
            num_samples=1500, batch_size=1500, generator=seed(), num_steps=16,
            reward=lambda delta: delta[:, :, 1].mean(dim=1), reward_scale=0.7,
        )  # fmt: skip
        expected = 0.3 * math.exp(0.7) / (0.7 + 0.3 * math.exp(0.7))
        assert abs(tokens[:, 0].double().mean().item() - expected) < 0.07  # 0.16 above what it is without

    def test_zero_is_plain_sampling(self):
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

    def test_embeddings_are_those_that_a_model_looks_up(self):
        class Scaled(nn.Embedding):
            def forward(self, ids):
                return 3 * super().forward(ids)

        scorer = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=1, n_head=2)).eval()
        scorer.transformer.wte = Scaled(53, 16)
        input_ids = torch.randint(53, (1, 7))
        reward = LanguageModelReward(scorer)(nn.functional.one_hot(input_ids, 53).float())
        torch.testing.assert_close(reward[0], -scorer(input_ids, labels=input_ids).loss)

    @pytest.mark.parametrize("vocab_size", [50, 53, 64])
    def test_classifiers_and_language_models(self, vocab_size):
        """One-hot soft tokens are tokens; vocabularies may differ at their end."""
        sizes = {"vocab_size": vocab_size, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(
            hidden_size=16,
            intermediate_size=16,
            id2label=dict(enumerate("abc")),
            label2id={"a": 0, "b": 1, "c": 2},
            **sizes,
        )
        classifier = BertForSequenceClassification(config).eval()
        scorer = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2)).eval()
        input_ids = torch.randint(50, (4, 7))
        soft = nn.functional.one_hot(input_ids, 53).float()
        expected = classifier(input_ids).logits.log_softmax(-1)[:, 1]
        torch.testing.assert_close(ClassifierReward(classifier, "b")(soft), expected)
        torch.testing.assert_close(ClassifierReward(classifier, 1)(soft), expected)
        torch.testing.assert_close(LanguageModelReward(scorer)(soft), torch.stack(
            [-scorer(row[None], labels=row[None]).loss for row in input_ids]))  # fmt: skip
        model = build_model("fmlm")
        for reward in (ClassifierReward(classifier, "b"), LanguageModelReward(scorer)):
            assert model.generate(num_samples=2, num_steps=2, reward=reward, reward_scale=1.0).shape == (2, 12)
        # Shorter texts are as if there were no padding.
        soft[:, 5:] = 0
        torch.testing.assert_close(ClassifierReward(classifier, 1)(soft), ClassifierReward(classifier, 1)(soft[:, :5]))
        torch.testing.assert_close(LanguageModelReward(scorer)(soft), LanguageModelReward(scorer)(soft[:, :5]))
        for label in ("d", 3, 1.0):
            with pytest.raises(ValueError, match=f"`label` must be one of 'a', 'b', 'c' or its number, got {label!r}"):
                ClassifierReward(classifier, label)
        with pytest.raises(ValueError, match="`model` must be a sequence classifier, got `GPT2LMHeadModel`"):
            ClassifierReward(scorer, 1)
        for other in (classifier, model):
            with pytest.raises(
                ValueError, match=f"`model` must be a causal language model, got `{type(other).__name__}`"
            ):
                LanguageModelReward(other)
        with pytest.raises(ValueError, match=f"`model` has {vocab_size} tokens, but texts are of 200"):
            LanguageModelReward(scorer)(torch.rand(1, 7, 200))


class TestFreshNoise:
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
        model = ExactFlowMap(texts, weights, num_steps=100)
        tokens = model.generate(num_samples=1500, batch_size=1500, generator=seed(), num_steps=4, gamma=gamma)
        assert_shares(tokens, dict(zip(texts, weights)))


class TestTimes:
    def test_grid(self):
        model = build_model("fmlm")
        prior = torch.randn(4, 12, 53)
        even = model.generate(prior_state=prior, num_steps=4)
        assert torch.equal(model.generate(prior_state=prior, timesteps=[0, 0.25, 0.5, 0.75, 1]), even)
        output = model.generate(prior_state=prior, timesteps=[0, 0.7, 1], return_dict_in_generate=True)
        assert output.num_forward_passes.eq(2).all()
        t = model.time_map.tau_to_t(torch.tensor([0.0, 0.7, 1.0]))
        zero, middle, one = (torch.full((4,), tau) for tau in (0.0, 0.7, 1.0))
        with torch.no_grad():
            x = (1 - t[1]) * prior + t[1] * dense_delta(model, prior, zero, middle)
            assert torch.equal(output.sequences, dense_delta(model, x, middle, one).argmax(-1))

    def test_what_is_said_last_counts(self):
        model = build_model("fmlm")
        model.generation_config.timesteps = [0.0, 0.5, 1.0]
        passes = lambda **options: model.generate(return_dict_in_generate=True, **options).num_forward_passes[0]  # noqa: E731
        assert passes() == 2
        assert passes(num_steps=5) == 5
        assert passes(timesteps=[0, 1]) == 1


class TestPrompts:
    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize("per_token_timesteps", [False, True])
    def test_equals_the_dense_sampler_with_known_positions_clean(self, kind, per_token_timesteps):
        """Known tokens are clamped here after every step; a network without times per token is told the time of the others."""
        model = build_model(kind, per_token_timesteps=per_token_timesteps)
        prior, input_ids = torch.randn(5, 12, 53), torch.randint(53, (5, 12))
        prompt_mask = torch.rand(5, 12) < 0.5
        clean = nn.functional.one_hot(input_ids, 53).float()

        def choose(x, tau_s, tau_t):
            x = torch.where(prompt_mask[..., None], clean, x)
            times = (
                torch.where(prompt_mask, 1.0, tau[:, None]) if per_token_timesteps else tau for tau in (tau_s, tau_t)
            )
            return dense_delta(model, x, *times)

        for num_steps in (1, 4):
            expected = torch.where(prompt_mask, input_ids, dense_sample(model, prior, num_steps, choose))
            tokens = model.generate(input_ids, prompt_mask=prompt_mask, prior_state=prior, num_steps=num_steps)
            assert torch.equal(tokens, expected)

    def test_network_is_told_the_time_of_each_token_or_the_earliest(self):
        x = torch.randn(5, 12, 53)
        times = torch.rand(5, 12), torch.ones(5, 12)
        for kind in ("flm", "fmlm", "two_network"):
            plain, told = build_model(kind), build_model(kind, per_token_timesteps=True)
            told.load_state_dict(plain.state_dict())
            earliest = times[0].amin(dim=1)
            with torch.no_grad():
                first, second = dense_delta(plain, x, *times), dense_delta(plain, x, earliest, torch.ones(5))
                if kind != "two_network":  # whose correction has a factor for each token
                    assert torch.equal(first, second)
                assert not torch.equal(dense_delta(told, x, *times), first)
                same = torch.full((5, 12), 0.3), torch.full((5, 12), 0.7)
                of_texts = dense_delta(told, x, same[0][:, 0], same[1][:, 0])
                torch.testing.assert_close(dense_delta(told, x, *same), of_texts)

    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    def test_come_back_unchanged_whatever_else(self, kind):
        model, weak = build_model(kind), build_model("flm", hidden_size=16)
        guided = {"guidance_model": weak, "guidance_scale": 20.0}
        rewarded = {"reward": lambda delta: delta[..., 3].sum(dim=1), "reward_scale": 100.0}
        rng = random.Random(0)
        for options in (
            {},
            {"num_steps": 3},
            guided,
            rewarded,
            {"gamma": 1.0},
            {"sampler_config": BridgeSamplerConfig(), "num_steps": 3, **guided},
            {**guided, **rewarded, "gamma": 0.5, "num_steps": 2},
        ):
            input_ids = torch.randint(53, (3, 12))
            prompt_mask = torch.rand(3, 12) < rng.random()
            output = model.generate(
                input_ids, prompt_mask=prompt_mask, num_samples=6, batch_size=4, output_drafts=True,
                return_dict_in_generate=True, **{"num_steps": 1, **options},
            )  # fmt: skip
            for row in range(6):
                known = prompt_mask[row // 2]
                assert torch.equal(output.sequences[row][known], input_ids[row // 2][known])
                assert (output.drafts[row][:, known] == input_ids[row // 2][known]).all()

    @pytest.mark.slow
    def test_processes_make_what_one_does(self, tmp_path):
        run_processes(continue_some, tmp_path)
        tokens = torch.cat([torch.load(tmp_path / f"{index}.pt") for index in (0, 1)])
        assert torch.equal(tokens, continue_prompts(list(range(7))))

    def test_padding_may_be_on_either_side(self):
        model = build_model("flm")
        prompts = [[5, 6, 7], [8], [9, 10]]
        prior = torch.randn(3, 12, 53)
        expected = torch.cat(
            [
                model.generate(torch.tensor([prompt]), prior_state=prior[n : n + 1], num_steps=3)
                for n, prompt in enumerate(prompts)
            ]
        )
        for side in ("left", "right"):
            rows = [([0] * (3 - len(p)), p) if side == "left" else (p, [0] * (3 - len(p))) for p in prompts]
            masks = [
                ([0] * (3 - len(p)), [1] * len(p)) if side == "left" else ([1] * len(p), [0] * (3 - len(p)))
                for p in prompts
            ]
            input_ids, attention_mask = (torch.tensor([a + b for a, b in x]) for x in (rows, masks))
            tokens = model.generate(input_ids, attention_mask=attention_mask, prior_state=prior, num_steps=3)
            assert torch.equal(tokens, expected)

    def test_sizes(self):
        model = build_model("flm")
        input_ids = torch.randint(53, (2, 4))
        prompt_mask = torch.tensor([[1, 0, 0, 1]] * 2)
        assert model.generate(input_ids, num_steps=1).shape == (2, 12)
        assert model.generate(input_ids, num_steps=1, num_samples=6, length=7).shape == (6, 7)
        assert model.generate(input_ids, num_steps=1, prompt_mask=prompt_mask).shape == (2, 4)
        tokens = model.generate(input_ids, num_steps=1, prompt_mask=prompt_mask, length=6)
        assert tokens.shape == (2, 6) and torch.equal(tokens[:, [0, 3]], input_ids[:, [0, 3]])
        config = FLMGenerationConfig(num_steps=1, length=7)
        assert model.generate(input_ids, generation_config=config).shape == (2, 7)
        model.generation_config.num_samples = 3
        assert model.generate(input_ids, num_steps=1).shape == (2, 12)
        nothing = torch.zeros_like(input_ids)
        assert torch.equal(
            model.generate(input_ids, num_steps=1, attention_mask=nothing, generator=seed()),
            model.generate(num_samples=2, num_steps=1, generator=seed()),
        )

    def test_offloaded_models_complete_prompts_too(self):
        model, weak = build_model("flm", per_token_timesteps=True), build_model("flm", hidden_size=16)
        options = {
            "prompt_mask": torch.rand(2, 12) < 0.5,
            "guidance_model": weak,
            "guidance_scale": 2.0,
            "num_steps": 2,
        }
        input_ids = torch.randint(53, (2, 12))
        expected = model.generate(input_ids, generator=seed(), **options)
        for network in (model, weak):
            cpu_offload(network)
        assert model.embed_tokens.weight.device.type == "meta"
        assert torch.equal(model.generate(input_ids, generator=seed(), **options), expected)

    def test_tokenizers_of_bert(self, caplog):
        model = build_model("flm")
        tokens = {
            "input_ids": torch.tensor([[1, 5, 2], [1, 2, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        }
        options = {"num_steps": 1, "eos_token_id": 2, "pad_token_id": 99}  # one that is not in the vocabulary
        transformers.logging.enable_propagation()
        assert model.generate(**tokens, token_type_ids=torch.zeros(2, 3), **options)[1, :2].tolist() == [1, 2]
        assert "`input_ids` end with an end-of-sequence token" in caplog.text
        transformers.logging.disable_propagation()

    @pytest.mark.parametrize("num_steps", [1, 3])
    def test_samples_have_the_conditional_distribution(self, num_steps):
        """Texts of three tokens with known probabilities, of which one or two are given."""
        texts = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        weights = (0.25, 0.05, 0.1, 0.15, 0.02, 0.2, 0.13, 0.1)
        model = ExactFlowMap(texts, weights, num_steps=100)
        for given in ({0: 1}, {2: 0}, {1: 1, 2: 0}):
            input_ids, prompt_mask = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool)
            for position, token in given.items():
                input_ids[0, position], prompt_mask[0, position] = token, True
            tokens = model.generate(
                input_ids,
                prompt_mask=prompt_mask,
                num_samples=1500,
                batch_size=1500,
                num_steps=num_steps,
                generator=seed(),
            )
            possible = {text: w for text, w in zip(texts, weights) if all(text[k] == v for k, v in given.items())}
            assert_shares(tokens, {text: weight / sum(possible.values()) for text, weight in possible.items()})


class TestLengths:
    def test_padding_is_as_if_it_were_not_there(self):
        model = build_model("flm")
        prior = torch.randn(3, 12, 53)
        lengths = [12, 5, 8]
        attention_mask = torch.arange(12) < torch.tensor(lengths)[:, None]
        tokens = model.generate(attention_mask=attention_mask, prior_state=prior, num_steps=3, pad_token_id=7)
        for row, length in enumerate(lengths):
            expected = model.generate(prior_state=prior[row : row + 1, :length], num_steps=3)
            assert torch.equal(tokens[row, :length], expected[0])
            assert (tokens[row, length:] == 7).all()
        # Infills of texts of different lengths
        input_ids, prompt_mask = torch.randint(53, (3, 12)), torch.rand(3, 12) < 0.5
        options = {"prior_state": prior, "num_steps": 3, "pad_token_id": 7}
        tokens = model.generate(input_ids, prompt_mask=prompt_mask, attention_mask=attention_mask, **options)
        part = model.generate(
            input_ids[1:2, :5], prompt_mask=prompt_mask[1:2, :5], prior_state=prior[1:2, :5], num_steps=3
        )
        assert torch.equal(tokens[1], torch.cat([part[0], torch.full((7,), 7)]))

    def test_texts_end(self):
        model = build_model("flm", vocab_size=6, max_position_embeddings=40)
        options = {"num_samples": 30, "num_steps": 2}
        plain = model.generate(generator=seed(), **options)
        for tokens in ({"eos_token_id": 2, "pad_token_id": 5}, {"eos_token_id": [2, 3], "pad_token_id": 5}):
            ends = torch.tensor(tokens["eos_token_id"]).flatten()
            short = model.generate(generator=seed(), pad_after_eos=True, **tokens, **options)
            for row, text in zip(short.tolist(), plain.tolist()):
                end = min([n for n, token in enumerate(text) if token in ends] + [len(text)])
                assert row == text[: end + 1] + [5] * (len(text) - end - 1)
        # Where one token begins and ends texts, the first one begins it; what is given does not end it.
        prompt = torch.tensor([[2, 1, 2, 4]])
        tokens = model.generate(
            prompt, num_samples=30, num_steps=2, pad_after_eos=True, eos_token_id=2, bos_token_id=2
        )
        assert torch.equal(tokens[:, :4], prompt.expand(30, -1))
        assert (tokens[:, 4] != 2).any()
        with pytest.raises(ValueError, match="`pad_after_eos` needs an `eos_token_id`"):
            model.generate(pad_after_eos=True)


@pytest.mark.slow
def test_compiled_steps_are_the_same():
    model, weak = build_model("fmlm", per_token_timesteps=True), build_model("flm", hidden_size=16)
    input_ids = torch.randint(53, (3, 4))
    for options in (
        {"guidance_model": weak, "guidance_scale": 2.0},
        {"gamma": 0.5},
        {"sampler_config": BridgeSamplerConfig(), "temperature": 0.5},
        {"reward": lambda delta: delta[..., 3].sum(dim=1), "reward_scale": 10.0},
    ):
        plain, compiled = (
            model.generate(input_ids, num_steps=3, generator=seed(), **options, **way)
            for way in ({}, sampling("compiled"))
        )
        assert torch.equal(plain, compiled)


def test_saved_scales_are_for_calls_with_a_guide():
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, "`input_ids` must be an integer tensor .* got list"),
        ({"input_ids": torch.tensor([1, 2])}, "`input_ids` must be an integer tensor of shape"),
        ({"input_ids": torch.tensor([[1, 53]])}, "`input_ids` must be tokens of the model, from 0 to 52"),
        ({"input_ids": torch.ones(1, 13, dtype=int)}, "`input_ids` has 13 tokens, but texts have 12"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "num_samples": 3}, "`num_samples=3` is not a multiple of the 2 rows of `input_ids`"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "attention_mask": torch.ones(2, 4)}, "`attention_mask` of shape .2, 4. does not go"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "prompt_mask": torch.ones(3)}, "`prompt_mask` must be a tensor with two"),
        ({"prompt_mask": torch.ones(2, 4)}, "`prompt_mask` says which of the `input_ids`"),
        ({"attention_mask": torch.ones(2, 4), "length": 5}, "`attention_mask` has 4 positions"),
        ({"attention_mask": torch.ones(2, 4), "num_samples": 3}, "not a multiple of the 2 rows of `attention_mask`"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "prior_state": torch.randn(3, 12, 53)}, "not a multiple of the 2 rows"),
        ({"guidance_scale": 1.0}, "`guidance_scale=1.0` needs a `guidance_model`"),
        ({"guidance_model": build_flm()}, "`guidance_model` needs a `guidance_scale`"),
        ({"guidance_model": build_flm(vocab_size=20), "guidance_scale": 1.0}, "`guidance_model` has 20 tokens, but the model has 53"),
        ({"guidance_model": nn.Linear(2, 2), "guidance_scale": 1.0}, "`guidance_model` must be a flow-based language model, got `Linear`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"reward_scale": 1.0}, "`reward_scale=1.0` needs a `reward`"),
        ({"reward": lambda delta: delta.sum((1, 2))}, "`reward` needs a `reward_scale`"),
        ({"reward": 3, "reward_scale": 1.0}, "`reward` must be a function"),
        ({"reward": lambda delta: delta.sum(), "reward_scale": 1.0}, "`reward` must return a tensor of shape .1,.*got .."),
        ({"reward": lambda delta: delta.argmax(-1).sum(-1), "reward_scale": 1.0}, "`reward` must be differentiable"),
        (
            {"reward": lambda delta: nn.Embedding(53, 1)(delta.argmax(-1)).sum((1, 2)), "reward_scale": 1.0},
            "`reward` must be differentiable",
        ),
        (
            {"reward": lambda delta: delta[:, 0, 0].log(), "reward_scale": 1.0, "top_k": 1},
            "The gradient of `reward` is not finite",
        ),
        ({"reward": build_flm(), "reward_scale": 1.0}, "`reward` must be a function of soft tokens.*got `FLMModel`"),
        (
            {"input_ids": torch.ones(1, 3, dtype=int), "attention_mask": torch.tensor([[1, 0, 1]])},
            "`attention_mask` must be 0 on the sides of a prompt only.*`prompt_mask`",
        ),
        ({"gamma": 1.5}, "`gamma` must be a number in .0, 1."),
        ({"gamma": 0.5, "sampler_config": BridgeSamplerConfig()}, "`gamma=0.5` does not go with a `sampler_config`"),
        ({"sampler_config": "bridge"}, "`sampler_config` must be one of FlowMapSamplerConfig, .*got 'bridge'"),
        (
            {"sampler_config": BridgeSamplerConfig(), "reward": lambda delta: delta.sum((1, 2)), "reward_scale": 1.0},
            "`reward` does not go with `BridgeSampler`",
        ),
        ({"timesteps": [0, 0.5]}, "`timesteps` must increase from 0 to 1"),
        ({"timesteps": [0, 0.5, 0.5, 1]}, "`timesteps` must increase from 0 to 1"),
        ({"timesteps": 4}, "`timesteps` must be a list of numbers"),
        ({"timesteps": [0, 0.5, 1], "num_steps": 3}, "`num_steps=3` does not go with the 3 `timesteps`"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(flm, arguments, message):
    with pytest.raises(ValueError, match=message):
        flm.generate(**{"num_steps": 2, **arguments} if "timesteps" not in arguments else arguments)
