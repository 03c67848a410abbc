"""The loop of rounds: exact distributions, batches, forward passes, callbacks and streamers."""

import itertools

import pytest
import torch
from exact_flows import ExactFlow, ExactFlowMap, chi_square
from small_models import build_model, sampling
from tensors import seed
from transformers import TextDiffusionStreamer
from transformers.generation.streamers import BaseStreamer

from modeling_flm import BridgeSamplerConfig, FLMGenerationConfig
from modeling_flm.tokenization_flm import train_tokenizer


class CertainFlowMap(ExactFlowMap):
    """The exact flow map, whose estimate of the whole way is a text, and no nearly so."""

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None):
        delta = super().encode(state, tau_s, tau_t, attention_mask)
        arrives = tau_t == 1
        arrives = arrives[:, None, None] if arrives.dim() == 1 else arrives[..., None]
        return torch.where(arrives, delta.round(), delta)


TEXTS = [(0, 0, 0), (0, 1, 1), (1, 1, 0), (1, 0, 1)]  # any two tokens leave the third open
WEIGHTS = (0.4, 0.3, 0.2, 0.1)


LIMIT = 21.1  # of 3 degrees of freedom: 1e-4
LOOPS = [
    {"num_rounds": 2},
    {"num_rounds": 3},
    {"num_rounds": 3, "commit_budget": 1},
    {"num_rounds": 5, "commit_budget": 1},
    {"num_rounds": 2, "num_steps": 3},
    {"block_length": 1},
    {"block_length": 2, "num_steps": 2},
]


class TestDistribution:
    options = {"num_samples": 1500, "batch_size": 1500, "num_steps": 1}

    @pytest.mark.parametrize("loop", LOOPS, ids=str)
    def test_is_exact_for_an_exact_flow_map(self, loop):
        model = CertainFlowMap(TEXTS, WEIGHTS, num_steps=40)
        tokens = model.generate(generator=seed(), **{**self.options, **loop})
        assert chi_square(tokens, TEXTS, WEIGHTS) < LIMIT

    @pytest.mark.parametrize("loop", LOOPS[1:6:4], ids=str)
    def test_is_exact_with_a_prompt_mask(self, loop):
        texts = list(itertools.product((0, 1), repeat=3))
        weights = torch.tensor([0.25, 0.05, 0.1, 0.15, 0.02, 0.2, 0.13, 0.1])
        model = CertainFlowMap(texts, tuple(weights.tolist()), num_steps=40)
        prompt = {"input_ids": torch.tensor([[0, 1, 0]]), "prompt_mask": torch.tensor([[0, 1, 0]])}
        tokens = model.generate(**prompt, generator=seed(), **{**self.options, **loop})
        chosen = [index for index, text in enumerate(texts) if text[1] == 1]
        conditional = (weights[chosen] / weights[chosen].sum()).tolist()
        assert chi_square(tokens, [texts[index] for index in chosen], conditional) < LIMIT

    def test_without_fresh_noise_texts_are_biased_where_tokens_depend_on_each_other(self):
        """What a token started from has decided the others, too: it is not independent of those that are known by now."""
        texts, weights = [(0, 0), (0, 1), (1, 1)], (0.5, 0.2, 0.3)
        model = CertainFlowMap(texts, weights, num_steps=40)
        options = {**self.options, "block_length": 1}
        kept = model.generate(generator=seed(), fresh_noise=False, **options)
        fresh = model.generate(generator=seed(), **options)
        assert chi_square(fresh, texts, weights) < 18.4 < chi_square(kept, texts, weights)  # of 2: 1e-4
        assert not ((kept[:, 0] == 1) & (kept[:, 1] == 0)).any()  # still nothing that cannot be

    def test_num_rounds_of_a_denoiser_come_nearer_with_their_steps(self):
        """An FLM has no jump from noise to text: with too few steps per round, its samples do not follow the data."""
        model, deviations = ExactFlow(TEXTS, WEIGHTS), []
        for num_steps in (1, 8, 64):
            options = {**self.options, "num_samples": 4000, "batch_size": 4000, "num_steps": num_steps}
            tokens = model.generate(num_rounds=3, generator=seed(), **options)
            shares = torch.tensor([(tokens == torch.tensor(text)).all(dim=1).double().mean() for text in TEXTS])
            # The total variation from the distribution of the data
            deviations.append((shares - torch.tensor(WEIGHTS)).abs().sum().item() / 2 + (1 - shares.sum().item()) / 2)
        assert deviations[0] > 0.2 and deviations[1] < deviations[0] and deviations[2] < 0.06

    def test_num_rounds_commit_no_token_of_probability_zero(self):
        class Forbidding(ExactFlow):
            def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
                return hidden_states * torch.tensor([0.0, 1.0, 1.0, 1.0])

        model = Forbidding([(1, 1), (2, 3), (1, 0)], (0.2, 0.2, 0.6))
        for options in ({}, {"sampler_config": BridgeSamplerConfig()}):
            for budget in ("uniform", 0, 1):
                tokens = model.generate(
                    num_samples=500, num_steps=2, num_rounds=3, commit_budget=budget, commit_threshold=0.5,
                    generator=seed(), **options,
                )  # fmt: skip
                assert (tokens > 0).all()


class TestGenerate:
    loops = [{"num_rounds": 3, "num_steps": 2}, {"block_length": 5, "num_steps": 2}]

    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize("loop", loops, ids=str)
    @pytest.mark.parametrize("more", [{}, {"gamma": 0.7}, {"sampler_config": BridgeSamplerConfig()}], ids=str)
    def test_texts_do_not_depend_on_batches(self, kind, loop, more):
        model = build_model(kind)
        input_ids, prompt_mask = torch.randint(53, (7, 12)), torch.rand(7, 12) < 0.5
        prompt_mask[2], prompt_mask[3, :7] = True, True
        options = {
            "input_ids": input_ids, "prompt_mask": prompt_mask, "commit_threshold": None, "output_drafts": True,
            "return_dict_in_generate": True, **loop, **more,
        }  # fmt: skip
        output = model.generate(generator=seed(), **options)
        for batch_size in (1, 3):
            again = model.generate(generator=seed(), batch_size=batch_size, **options)
            for name, value in output.items():
                assert torch.equal(value, again[name]), name
        assert torch.equal(output.sequences[prompt_mask], input_ids[prompt_mask])
        assert (output.commit_rounds == 0).equal(prompt_mask)
        assert torch.equal(output.drafts[:, -1], output.sequences)
        rounds = -(-12 // loop["block_length"]) if "block_length" in loop else 3
        assert output.drafts.shape == (7, rounds, 12)
        # Known sequences take no forward pass, and neither do blocks of the prompt
        assert output.num_forward_passes[2] == 0
        if "block_length" in loop:
            blocks = [len({int(p) // 5 for p in (~row).nonzero()}) for row in prompt_mask]
            assert output.num_forward_passes.tolist() == [2 * number for number in blocks]

    @pytest.mark.parametrize("kind", ["flm", "fmlm"])
    def test_num_rounds_1_and_block_length_of_all_are_plain_generation(self, kind):
        model = build_model(kind)
        options = {"num_samples": 5, "num_steps": 3}
        plain = model.generate(generator=seed(), **options)
        assert torch.equal(model.generate(generator=seed(), num_rounds=1, **options), plain)
        assert torch.equal(model.generate(generator=seed(), block_length=12, **options), plain)

    def test_num_rounds_end_early_where_all_is_certain(self):
        model = CertainFlowMap(TEXTS, WEIGHTS, num_steps=20)
        options = {"num_samples": 20, "num_rounds": 5, "commit_budget": 0, "return_dict_in_generate": True}
        output = model.generate(generator=seed(), commit_threshold=0.9, **options)
        assert output.num_forward_passes.eq(1).all() and output.commit_rounds.eq(1).all()
        reward = lambda delta: delta[..., 1].mean(dim=1)  # noqa: E731
        output = ExactFlow(TEXTS, WEIGHTS).generate(reward=reward, reward_scale=0.1, num_steps=4, **options)
        assert output.num_forward_passes.eq(2 * 4 * 5).all()  # no threshold, and no budget

    def test_prior_state_is_not_changed_by_num_rounds(self):
        model = build_model("fmlm")
        prior = torch.randn(3, 12, 32)
        before = prior.clone()
        tokens = model.generate(prior_state=prior, num_rounds=4, generator=seed())
        assert torch.equal(prior, before)
        assert torch.equal(tokens, model.generate(prior_state=prior, num_rounds=4, generator=seed()))

    def test_guidance_scale(self):
        model, weak = build_model("fmlm"), build_model("flm", hidden_size=16)
        options = {"num_samples": 6, "num_rounds": 3}
        plain = model.generate(generator=seed(), **options)
        guided = {"guidance_model": weak, "guidance_scale": 3.0, **options}
        assert not torch.equal(model.generate(generator=seed(), **guided), plain)
        guided["guidance_scale"] = 0.0
        assert torch.equal(model.generate(generator=seed(), **guided), plain)

    @pytest.mark.slow
    def test_compiled_num_rounds_are_equal_and_take_one_graph(self):
        model = build_model("fmlm", per_token_timesteps=True)
        input_ids, prompt_mask = torch.randint(53, (5, 12)), torch.rand(5, 12) < 0.5
        options = {"input_ids": input_ids, "prompt_mask": prompt_mask, "num_rounds": 6, "commit_threshold": 0.05}
        expected = model.generate(generator=seed(), **options)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert torch.equal(model.generate(generator=seed(), **options, **sampling("compiled")), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_block_length_and_num_rounds_write_nothing_after_a_known_end(self):
        """A text whose third token ends it: from left to right, no block after it costs anything."""
        model = build_model("fmlm")
        with torch.no_grad():
            model.lm_head.weight.zero_(), model.lm_head.bias.zero_()
            model.lm_head.bias[7] = 25.0  # whatever the state
        options = {"num_samples": 3, "pad_after_eos": True, "eos_token_id": 7, "pad_token_id": 1, "num_steps": 1}
        options |= {"return_dict_in_generate": True}
        output = model.generate(block_length=2, **options)
        assert output.num_forward_passes.eq(1).all()
        assert output.sequences[:, 0].eq(7).all() and output.sequences[:, 1:].eq(1).all()
        prompt = torch.tensor([[7, 7, 3]])  # does not end the text
        output = model.generate(prompt, block_length=2, **options)
        assert output.sequences.tolist() == [[7, 7, 3, 7] + [1] * 8] * 3 and output.num_forward_passes.eq(1).all()
        output = model.generate(num_rounds=4, **options)
        assert output.sequences[:, 1:].eq(1).all() and output.num_forward_passes.eq(1).all()
        assert model.generate(block_length=2, **{**options, "pad_after_eos": False}).num_forward_passes.eq(6).all()

    def test_callback_with_block_length_is_called_for_every_round(self):
        model, calls = build_model("fmlm"), []
        input_ids = torch.randint(53, (1, 4))
        model.generate(input_ids, block_length=2, num_steps=2, callback=lambda *args: calls.append(args[:2]))
        assert calls == [(n, 6) for n in range(1, 7)]

    def test_callback_with_num_rounds_is_called_for_every_round(self):
        model, calls = build_model("fmlm"), []
        tokens = model.generate(num_samples=2, num_rounds=3, num_steps=2, callback=lambda *args: calls.append(args))
        assert [args[:2] for args in calls] == [(1, 3), (2, 3), (3, 3)]
        assert torch.equal(calls[-1][2], tokens)

    @pytest.mark.parametrize("loop", [{"num_rounds": 6}, {"block_length": 2}], ids=str)
    def test_streamers_see_known_tokens_grow(self, loop):
        class Record(BaseStreamer):
            def __init__(self):
                self.known, self.drafts = [], []

            def put(self, value):
                self.known.append(value.flatten())

            def put_draft(self, value):
                self.drafts.append((sum(map(len, self.known)), value.flatten()))

            def end(self):
                self.known.append("end")

        model, streamer = build_model("fmlm"), Record()
        output = model.generate(streamer=streamer, generator=seed(), return_dict_in_generate=True, **loop)
        assert streamer.known.pop() == "end"
        assert torch.equal(torch.cat(streamer.known), output.sequences[0])
        assert all(shown + len(draft) == 12 for shown, draft in streamer.drafts)
        shown = [shown for shown, _ in streamer.drafts]
        assert shown == sorted(shown) and len(shown) == 5
        assert shown == [int((output.commit_rounds[0] <= r).long().cumprod(0).sum()) for r in range(1, 6)]
        assert shown[-1] == 10 or "num_rounds" in loop

    def test_streamer_of_transformers_with_num_rounds(self, capsys):
        model, tokenizer = build_model("fmlm"), train_tokenizer([" ".join(map(str, range(60)))], "word", 60)
        model.generate(num_rounds=3, streamer=TextDiffusionStreamer(tokenizer), generator=seed())
        assert "\x1b[33m" in capsys.readouterr().out

    def test_bad_combinations_with_num_rounds_and_block_length_are_named(self):
        model = build_model("fmlm")
        for options, message in (
            ({"num_rounds": 2, "block_length": 3}, "`num_rounds` cannot be combined with `block_length`"),
            ({"commit_threshold": 0.9}, "`commit_threshold=0.9` needs `num_rounds`"),
            ({"commit_budget": 3, "block_length": 3}, "`commit_budget=3` needs `num_rounds`"),
            ({"fresh_noise": False}, "`fresh_noise=False` needs `num_rounds` or `block_length`"),
            ({"num_rounds": 0}, "`num_rounds` must be an integer of at least 1"),
            ({"block_length": 2.0}, "`block_length` must be an integer of at least 1"),
            ({"num_rounds": 2, "commit_threshold": 1.5}, "`commit_threshold` must be a probability"),
            ({"num_rounds": 2, "commit_budget": "all"}, "`commit_budget` must be 'uniform' or a number"),
            ({"num_rounds": 2, "fresh_noise": "no"}, "`fresh_noise` must be `True` or `False`"),
            ({"num_rounds": 2, "commit_budget": -1}, "`commit_budget` must be 'uniform' or a number"),
        ):
            with pytest.raises(ValueError, match=message):
                model.generate(**options)

    def test_what_is_said_last_of_num_rounds_and_block_length_counts(self, tmp_path):
        model = build_model("fmlm")
        model.generation_config.num_rounds = 3
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
        passes = lambda **more: model.generate(return_dict_in_generate=True, **more).num_forward_passes.item()  # noqa: E731
        assert passes() == 3 and passes(num_rounds=2) == 2 and passes(block_length=3) == 4
        assert passes(generation_config=FLMGenerationConfig(num_rounds=4)) == 4
        assert passes(commit_budget=12) == 1
