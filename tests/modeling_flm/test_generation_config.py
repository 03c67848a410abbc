"""Parameters of `generate()`: precedence, files, errors for bad combinations, and warnings about no effect."""

import copy
import json
import pickle

import pytest
import torch
from dense_sampler import dense_delta
from small_models import build_flm, build_model
from tensors import seed
from torch import nn
from transformers import (
    AutoModel,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import logging

from modeling_flm import BridgeSamplerConfig, FLMGenerationConfig


def test_precedence_of_parameters(flm):
    flm.generation_config.num_steps = 5
    passes = lambda **kwargs: flm.generate(return_dict_in_generate=True, **kwargs).num_forward_passes[0]  # noqa: E731
    assert passes() == 5
    assert passes(generation_config=FLMGenerationConfig(num_steps=3)) == 3
    assert passes(generation_config=FLMGenerationConfig(num_samples=2)) == 5
    assert passes(generation_config=FLMGenerationConfig(num_steps=3), num_steps=2) == 2
    assert flm.generation_config.num_steps == 5 and flm.generation_config.num_samples is None
    with pytest.raises(ValueError, match="Unknown generation parameters `max_new_tokens`"):
        FLMGenerationConfig(max_new_tokens=3)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_length", "pass `length`"),
        ("do_sample", "samples differ by their noise, see `generator`"),
        ("seed", "manual_seed"),
        ("stopping_criteria", "`pad_after_eos=True`"),
        ("return_full_text", "samples include their prompts"),
        ("num_stepz", "did you mean `num_steps`"),
    ],
)
def test_arguments_of_other_models_name_ours(flm, name, hint):
    for call in (flm.generate, FLMGenerationConfig):
        with pytest.raises(ValueError, match=rf"`{name}` \(.*{hint}"):
            call(**{name: 1})


class TestNamesOfOtherLibraries:
    """Names that mean the same in transformers or diffusers."""

    @pytest.mark.parametrize(
        "theirs, ours",
        [
            ({"num_inference_steps": 3}, {"num_steps": 3}),
            ({"num_return_sequences": 2}, {"num_samples": 4}),
            ({"max_new_tokens": 5}, {"length": 8}),
            (
                {"num_return_sequences": 3, "max_new_tokens": 1, "num_inference_steps": 2},
                {"num_samples": 6, "length": 4, "num_steps": 2},
            ),  # fmt: skip
        ],
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_are_accepted(self, theirs, ours, padded, flm):
        flm.generation_config.num_steps = 1
        prompts = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
        if padded:  # on the left, as tokenizers of generators do
            prompts = {"input_ids": torch.nn.functional.pad(prompts["input_ids"], (2, 0))}
            prompts["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1]] * 2)
        samples = [
            flm.generate(**prompts, **names, generator=torch.Generator().manual_seed(0)) for names in (theirs, ours)
        ]
        assert samples[0].tolist() == samples[1].tolist()

    def test_without_prompts(self, flm):
        assert flm.generate(num_return_sequences=3, max_new_tokens=7, num_inference_steps=1).shape == (3, 7)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_inference_steps": 2, "num_steps": 2}, "`num_inference_steps` and `num_steps` were both passed"),
            ({"num_return_sequences": 0}, "`num_return_sequences` must be an integer of at least 1, got 0"),
            ({"max_new_tokens": 2.5}, "`max_new_tokens` must be an integer of at least 1, got 2.5"),
            ({"max_new_tokens": 99}, "but the model has at most"),
        ],
    )
    def test_bad_values_are_refused(self, arguments, message, flm):
        with pytest.raises(ValueError, match=message):
            flm.generate(**arguments)

    @pytest.mark.parametrize("mask", ["attention_mask", "prompt_mask"])
    def test_max_new_tokens_needs_prompts_of_one_length(self, mask, flm):
        ids, is_prompt = torch.tensor([[5, 6], [7, 7]]), torch.tensor([[1, 1], [1, 0]])
        with pytest.raises(ValueError, match="`max_new_tokens` needs prompts of the same length: pass `length`"):
            flm.generate(ids, max_new_tokens=3, **{mask: is_prompt})


class TestGenerationConfig:
    def test_unknown_parameters_are_refused_where_they_are_set(self, flm, tmp_path):
        with pytest.raises(AttributeError, match=r"Unknown generation parameter `max_new_tokens` \(pass `length`"):
            flm.generation_config.max_new_tokens = 20
        with pytest.raises(AttributeError, match="did you mean `num_steps`"):
            flm.generation_config.num_stepz = 20
        flm.generation_config.num_steps = 3
        for config in (copy.deepcopy(flm.generation_config), pickle.loads(pickle.dumps(flm.generation_config))):
            with pytest.raises(AttributeError):
                config.do_sample = True
        flm.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).generation_config.num_steps == 3

    def test_files_have_what_is_set_and_nothing_else(self, flm, tmp_path):
        flm.generation_config.temperature = 0.7
        flm.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "generation_config.json").read_text())
        assert saved.keys() == {"temperature", "transformers_version"}
        assert AutoModel.from_pretrained(tmp_path).generation_config == flm.generation_config

    def test_unknown_parameters_of_a_file_are_ignored_with_a_warning(self, flm, tmp_path, caplog):
        flm.save_pretrained(tmp_path)
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps({"num_steps": 3, "max_new_tokens": 20, "of_a_later_version": 1}))
        model = AutoModel.from_pretrained(tmp_path)
        assert "unknown parameters, which are ignored: max_new_tokens, of_a_later_version" in caplog.text
        assert model.generate(return_dict_in_generate=True).num_forward_passes == 3


class TestNoEffect:
    """Warnings of what changes nothing, and that it changes nothing."""

    @pytest.fixture(autouse=True)
    def warns_again(self):
        logging.get_logger().warning_once.__func__.cache_clear()

    @pytest.mark.parametrize("option", [{"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.5}])
    def test_in_one_step(self, option, caplog):
        model = build_model("fmlm")
        options = {"num_samples": 5, **option}
        tokens = model.generate(generator=seed(), **options)
        (name,) = option
        assert f"`{name}` has no effect in one step" in caplog.text
        assert torch.equal(tokens, model.generate(num_samples=5, generator=seed()))

    @pytest.mark.parametrize(
        "options",
        [
            {"num_steps": 2},
            {"sampler_config": BridgeSamplerConfig()},
            {"num_rounds": 2, "commit_threshold": 0.1},
            {"reward": lambda delta: 9 * delta[..., 3].sum(dim=1), "reward_scale": 9.0},
            {"guidance_model": build_flm(hidden_size=16), "guidance_scale": 2.0},
        ],
    )
    def test_no_warning_where_there_is_an_effect(self, options, caplog):
        model = build_model("fmlm", per_token_timesteps=True)
        options = {"num_samples": 50, "temperature": 0.1, **options}
        tokens = model.generate(generator=seed(), **options)
        assert "no effect" not in caplog.text
        assert not torch.equal(tokens, model.generate(generator=seed(), **{**options, "temperature": 1.0}))

    def test_two_networks_are_not_a_softmax(self, caplog):
        model = build_model("two_network")
        tokens = model.generate(num_samples=50, generator=seed(), temperature=0.1)
        assert "no effect" not in caplog.text
        assert not torch.equal(tokens, model.generate(num_samples=50, generator=seed()))

    @pytest.mark.parametrize(
        "processor",
        [
            RepetitionPenaltyLogitsProcessor(5.0),
            NoRepeatNGramLogitsProcessor(2),
            NoBadWordsLogitsProcessor([[3, 4]]),
        ],
    )
    def test_processors_that_look_back(self, processor, flm, caplog):
        plain = flm.generate(num_samples=5, num_steps=3, generator=seed())
        processors = LogitsProcessorList([processor])
        tokens = flm.generate(num_samples=5, num_steps=3, generator=seed(), logits_processor=processors)
        assert torch.equal(tokens, plain)
        assert f"`{type(processor).__name__}` conditions on previous tokens" in caplog.text

    def test_bad_words_of_one_token(self, flm, caplog):
        processors = LogitsProcessorList([NoBadWordsLogitsProcessor([[token] for token in range(20)])])
        tokens = flm.generate(num_samples=5, num_steps=3, logits_processor=processors)
        assert "conditions on" not in caplog.text and (tokens >= 20).all()

    def test_whole_prompts(self, flm, caplog):
        flm.generate(torch.randint(53, (2, 11)), num_steps=1)
        assert "nothing to generate" not in caplog.text
        flm.generate(torch.randint(53, (2, 12)), num_steps=1)
        assert "nothing to generate" in caplog.text

    def test_padding_without_a_mask(self, flm, caplog):
        options = {"num_steps": 1, "pad_token_id": 0}
        padded = torch.tensor([[5, 6, 7], [5, 6, 0]])
        flm.generate(padded, attention_mask=(padded > 0).long(), **options)
        flm.generate(padded[:1], **options)
        assert "padding" not in caplog.text
        flm.generate(padded, **options)
        assert "pass the tokenizer's `attention_mask` as well" in caplog.text

    @pytest.mark.parametrize("compile", [lambda model: model.compile(), lambda model: vars(model).update(
        forward=torch.compile(model.forward))])  # fmt: skip
    def test_compiled_forward(self, compile, flm, caplog):
        flm.generate(num_steps=1)
        assert "compile_config" not in caplog.text
        compile(flm)
        flm.generate(num_steps=1)
        assert "pass `compile_config=CompileConfig()`" in caplog.text


class TestTimestepGrid:
    def test_grid(self):
        model = build_model("fmlm")
        prior = torch.randn(4, 12, 53)
        state = prior @ model.state_embedding
        even = model.generate(prior_state=state, num_steps=4)
        assert torch.equal(model.generate(prior_state=state, timestep_grid=[0, 0.25, 0.5, 0.75, 1]), even)
        output = model.generate(prior_state=state, timestep_grid=[0, 0.7, 1], return_dict_in_generate=True)
        assert output.num_forward_passes.eq(2).all()
        t = model.time_map.tau_to_t(torch.tensor([0.0, 0.7, 1.0]))
        zero, middle, one = (torch.full((4,), tau) for tau in (0.0, 0.7, 1.0))
        with torch.no_grad():
            x = (1 - t[1]) * prior + t[1] * dense_delta(model, prior, zero, middle)
            assert torch.equal(output.sequences, dense_delta(model, x, middle, one).argmax(-1))

    def test_what_is_said_last_counts(self):
        model = build_model("fmlm")
        model.generation_config.timestep_grid = [0.0, 0.5, 1.0]
        passes = lambda **options: model.generate(return_dict_in_generate=True, **options).num_forward_passes[0]  # noqa: E731
        assert passes() == 2
        assert passes(num_steps=5) == 5
        assert passes(timestep_grid=[0, 1]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 2]]}, "`input_ids` must be an integer tensor .* got list"),
        ({"input_ids": torch.tensor([1, 2])}, "`input_ids` must be an integer tensor of shape"),
        ({"input_ids": torch.tensor([[1, 53]])}, "`input_ids` must be between 0 and 52"),
        ({"input_ids": torch.ones(1, 13, dtype=int)}, "`input_ids` has 13 tokens, but samples have 12"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "num_samples": 3}, "`num_samples=3` is not a multiple of the 2 rows of `input_ids`"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "attention_mask": torch.ones(2, 4)}, "`attention_mask` of shape .2, 4. does not match"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "prompt_mask": torch.ones(3)}, "`prompt_mask` must be a tensor with two"),
        ({"prompt_mask": torch.ones(2, 4)}, "`prompt_mask` marks the known tokens of `input_ids`"),
        ({"attention_mask": torch.ones(2, 4), "length": 5}, "`attention_mask` must cover all positions of a sample, but has 4"),
        ({"attention_mask": torch.ones(2, 4), "num_samples": 3}, "not a multiple of the 2 rows of `attention_mask`"),
        ({"input_ids": torch.ones(2, 3, dtype=int), "prior_state": torch.randn(3, 12, 32)}, "not a multiple of the 2 rows"),
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
            "`attention_mask` may be 0 only before and after a prompt.*`prompt_mask`",
        ),
        ({"gamma": 1.5}, "`gamma` must be a number in .0, 1."),
        ({"gamma": 0.5, "sampler_config": BridgeSamplerConfig()}, "`gamma=0.5` cannot be combined with `sampler_config`"),
        ({"sampler_config": "bridge"}, "`sampler_config` must be one of FlowMapSamplerConfig, .*got 'bridge'"),
        (
            {"sampler_config": BridgeSamplerConfig(), "reward": lambda delta: delta.sum((1, 2)), "reward_scale": 1.0},
            "`reward` cannot be combined with `BridgeSampler`",
        ),
        ({"timestep_grid": [0, 0.5]}, "`timestep_grid` must increase from 0 to 1"),
        ({"timestep_grid": [0, 0.5, 0.5, 1]}, "`timestep_grid` must increase from 0 to 1"),
        ({"timestep_grid": 4}, "`timestep_grid` must be a list of numbers"),
        ({"timestep_grid": [0, 0.5, 1], "num_steps": 3}, "`num_steps=3` does not match the 3 times of `timestep_grid`"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(flm, arguments, message):
    with pytest.raises(ValueError, match=message):
        flm.generate(**{"num_steps": 2, **arguments} if "timestep_grid" not in arguments else arguments)
