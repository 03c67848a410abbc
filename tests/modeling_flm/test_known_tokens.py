"""Known tokens: prompts, gaps and padding stay unchanged, the rest has its conditional distribution, and texts end at EOS."""

import random
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState, cpu_offload
from dense_sampler import dense_delta, dense_sample
from exact_flows import ExactFlowMap, assert_shares
from processes import run_processes
from small_models import build_model
from tensors import seed
from torch import nn

from modeling_flm import BridgeSamplerConfig, FLMGenerationConfig
from modeling_flm.known_tokens_flm import lengths_up_to_eos
from modeling_flm.trainers import generate_samples


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


class TestPrompts:
    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize("per_token_timesteps", [False, True])
    def test_prompt_mask_equals_the_dense_sampler_with_known_positions_clean(self, kind, per_token_timesteps):
        """The reference clamps known tokens after every step. Networks without per-token times get the time of the others."""
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
            tokens = model.generate(
                input_ids, prompt_mask=prompt_mask, prior_state=prior @ model.state_embedding, num_steps=num_steps
            )
            assert torch.equal(tokens, expected)

    def test_network_is_conditioned_on_per_token_timesteps_or_the_earliest(self):
        x = torch.randn(5, 12, 53)
        times = torch.rand(5, 12), torch.ones(5, 12)
        for kind in ("flm", "fmlm", "two_network"):
            plain, per_token = build_model(kind), build_model(kind, per_token_timesteps=True)
            per_token.load_state_dict(plain.state_dict())
            earliest = times[0].amin(dim=1)
            with torch.no_grad():
                first, second = dense_delta(plain, x, *times), dense_delta(plain, x, earliest, torch.ones(5))
                if kind != "two_network":  # whose correction has a factor for each token
                    assert torch.equal(first, second)
                assert not torch.equal(dense_delta(per_token, x, *times), first)
                same = torch.full((5, 12), 0.3), torch.full((5, 12), 0.7)
                of_texts = dense_delta(per_token, x, same[0][:, 0], same[1][:, 0])
                torch.testing.assert_close(dense_delta(per_token, x, *same), of_texts)

    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    def test_tokens_of_a_prompt_mask_come_back_unchanged_whatever_else(self, kind):
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

    def test_padding_of_attention_mask_may_be_on_either_side(self):
        model = build_model("flm")
        prompts = [[5, 6, 7], [8], [9, 10]]
        prior = torch.randn(3, 12, 32)
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

    def test_sizes_with_num_samples_length_and_prompt_mask(self):
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
    def test_samples_given_a_prompt_mask_have_the_conditional_distribution(self, num_steps):
        """Sequences of three tokens with known probabilities, given one or two of them."""
        texts = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        weights = (0.25, 0.05, 0.1, 0.15, 0.02, 0.2, 0.13, 0.1)
        model = ExactFlowMap(texts, weights)
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
    def test_padding_of_attention_mask_is_as_if_it_were_not_there(self):
        model = build_model("flm")
        prior = torch.randn(3, 12, 32)
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

    def test_pad_after_eos_ends_texts(self):
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


@pytest.mark.parametrize(
    "eos, bos, expected",
    [(2, None, [1, 5, 2]), (2, 2, [3, 5, 2]), ([2, 3], None, [1, 4, 2]), ([3, 2], 2, [3, 4, 2]), (None, 2, [5, 5, 5])],
)
def test_lengths_up_to_eos(eos, bos, expected):
    sequences = torch.tensor([[2, 1, 2, 4, 2], [1, 1, 1, 3, 1], [0, 2, 2, 2, 2]])
    assert lengths_up_to_eos(sequences, eos, bos).tolist() == expected
    if eos == 2:  # tokens of a prompt do not end a text
        may_end = torch.arange(5).expand(3, 5) >= 2
        assert lengths_up_to_eos(sequences, eos, bos, may_end).tolist() == [3, 5, 3]
