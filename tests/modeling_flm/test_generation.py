"""`generate()`: what it returns, what it refuses, and that it computes what it says."""

import copy
import json
import pickle

import pytest
import torch
from dense_sampler import dense_delta
from small_models import build_flm, build_model, sampling
from tensors import seed
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.utils import logging

from modeling_flm import BridgeSamplerConfig, FLMGenerationConfig, FLMGenerationOutput, utils_flm


@pytest.fixture
def tokenizer():
    vocabulary = {f"w{index}": index for index in range(53)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_shapes_and_defaults(flm):
    assert flm.generate(num_steps=2).shape == (1, 12)
    assert flm.generate(num_samples=3, num_steps=2, length=5).shape == (3, 5)
    output = flm.generate(num_samples=3, num_steps=4, return_dict_in_generate=True)
    assert isinstance(output, FLMGenerationOutput)
    assert output.drafts is None and output.num_forward_passes.eq(4).all()
    output = flm.generate(num_samples=3, num_steps=4, return_dict_in_generate=True, output_drafts=True)
    assert output.drafts.shape == (3, 4, 12)
    assert torch.equal(output.drafts[:, -1], output.sequences)


def test_seeds_reproduce_and_batches_do_not_matter(flm):
    expected = flm.generate(num_samples=7, num_steps=3, generator=seed())
    assert torch.equal(flm.generate(num_samples=7, num_steps=3, generator=seed()), expected)
    assert torch.equal(flm.generate(num_samples=7, num_steps=3, generator=seed(), batch_size=2), expected)
    assert not torch.equal(flm.generate(num_samples=7, num_steps=3, generator=seed(1)), expected)
    torch.manual_seed(5)
    first = flm.generate(num_samples=2, num_steps=3)
    torch.manual_seed(5)
    assert torch.equal(flm.generate(num_samples=2, num_steps=3), first)


def test_long_sequences_are_denoised_in_chunks(flm, monkeypatch):
    expected = flm.generate(num_samples=4, num_steps=3, generator=seed())
    widths = []
    head = flm.lm_head.forward
    monkeypatch.setattr(flm.lm_head, "forward", lambda x: widths.append(x.shape[1]) or head(x))
    monkeypatch.setitem(utils_flm.CHUNK_ELEMENTS, "cpu", 20 * 53)
    assert torch.equal(flm.generate(num_samples=4, num_steps=3, generator=seed()), expected)
    assert widths == [5, 5, 2] * 3


def test_prior_has_the_distribution_of_projected_noise():
    model = build_flm(vocab_size=200, max_position_embeddings=64)
    states = []
    model.layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model.generate(num_samples=640, num_steps=1, batch_size=640)
    state = states[0].flatten(0, 1)
    embedding = model.state_embedding.detach()
    expected = embedding.T @ embedding
    covariance = state.T @ state / len(state)
    # 40960 draws: a relative error of 1/sqrt(n) per entry, and 6 standard errors of room
    scale = (expected.diag()[:, None] * expected.diag()).sqrt()
    assert ((covariance - expected) / scale).abs().max() < 6 * 2**0.5 / len(state) ** 0.5


def test_temperature_top_k_and_processors_act_at_every_step(flm):
    plain = flm.generate(num_samples=20, num_steps=4, generator=seed())
    cold = flm.generate(num_samples=20, num_steps=4, generator=seed(), temperature=1e-6)
    greedy = flm.generate(num_samples=20, num_steps=4, generator=seed(), top_k=1)
    nucleus = flm.generate(num_samples=20, num_steps=4, generator=seed(), top_p=1e-6)
    # A vanishing temperature, one token and a vanishing nucleus are all the argmax.
    assert torch.equal(cold, greedy) and torch.equal(nucleus, greedy)
    assert not torch.equal(cold, plain)
    assert torch.equal(flm.generate(num_samples=20, num_steps=4, generator=seed(), temperature=1.0), plain)

    banned = plain.unique()[:5].tolist()
    processor = LogitsProcessorList([SuppressTokensLogitsProcessor(banned, device="cpu")])
    tokens = flm.generate(num_samples=20, num_steps=4, generator=seed(), logits_processor=processor)
    assert not torch.isin(tokens, torch.tensor(banned)).any()


def test_callback_sees_every_step(flm):
    seen = []
    output = flm.generate(
        num_samples=3, num_steps=4, batch_size=2, callback=lambda *args: seen.append(args),
        return_dict_in_generate=True, output_drafts=True,
    )  # fmt: skip
    assert [(step, total, tokens.shape[0]) for step, total, tokens in seen] == [
        (step, 4, size) for size in (2, 1) for step in (1, 2, 3, 4)
    ]
    assert torch.equal(seen[1][2], output.drafts[:2, 1])


def test_streamer_shows_drafts_then_the_text(flm, tokenizer, capsys):
    output = flm.generate(
        num_steps=3, generator=seed(), streamer=TextDiffusionStreamer(tokenizer),
        return_dict_in_generate=True, output_drafts=True,
    )  # fmt: skip
    shown = capsys.readouterr().out
    drafts = [tokenizer.decode(draft) for draft in output.drafts[0]]
    positions = [shown.index(draft) for draft in drafts]
    assert positions == sorted(positions)
    assert shown.endswith(drafts[-1] + "\n")

    streamer = TextIteratorStreamer(tokenizer)  # has no drafts
    flm.generate(num_steps=3, generator=seed(), streamer=streamer)
    assert "".join(streamer) == drafts[-1]
    capsys.readouterr()
    flm.generate(num_steps=3, generator=seed(), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == drafts[-1] + "\n"
    with pytest.raises(ValueError, match="`streamer` needs a single sample"):
        flm.generate(num_samples=2, num_steps=3, streamer=TextDiffusionStreamer(tokenizer))


def test_progress_bar_only_for_several_batches(flm, capsys):
    flm.generate(num_samples=4, num_steps=1, batch_size=4)
    assert "Generating" not in capsys.readouterr().err
    flm.generate(num_samples=5, num_steps=1, batch_size=2)
    assert "Generating: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1, got 0"),
        ({"num_steps": 2.5}, "`num_steps`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"num_samples": True}, "`num_samples`"),
        ({"length": 13}, "`length` is 13, but the model has at most 12 positions"),
        ({"length": 0}, "`length`"),
        ({"batch_size": -1}, "`batch_size`"),
        ({"temperature": 0.0}, "`temperature` must be a number above 0"),
        ({"top_k": 0}, "`top_k`"),
        ({"top_p": 1.5}, "`top_p`"),
        ({"num_stpes": 3}, "`num_stpes` .did you mean `num_steps`"),
        ({"input_id": torch.ones(1, 3)}, "unknown arguments: `input_id`"),
        ({"_commit_hash": "x"}, "unknown arguments"),
        (
            {"prior_state": torch.randn(2, 12, 7)},
            r"`prior_state` must have the shape .*\(2, 12, 32\), got \(2, 12, 7\)",
        ),
        (
            {"prior_state": torch.randn(2, 12, 53)},
            "`prior_state` must have the shape .*`noise @ model.state_embedding`",
        ),
        ({"prior_state": torch.randn(12, 32)}, r"`prior_state` must have the shape .*got \(12, 32\)"),
        ({"prior_state": torch.randn(2, 13, 32)}, "`length` is 13"),
        ({"temperature": "hot"}, "`temperature` must be a number"),
        (
            {"generation_config": GenerationConfig(max_new_tokens=3)},
            r"Unknown generation parameters `max_new_tokens` \(pass `length`",
        ),
        (
            {"prior_state": torch.randn(2, 12, 32), "num_samples": 3},
            r"`prior_state` must have the shape .*\(3, 12, 32\)",
        ),
        ({"prior_state": torch.randn(2, 12, 32), "length": 5}, r"`prior_state` must have the shape .*\(2, 5, 32\)"),
        ({"noise_source": lambda samples: torch.randn(1, 12, 53)}, "`noise_source` must have the shape"),
        ({"noise_source": 3}, "`noise_source` must be a function of sample indices"),
        (
            {"logits_processor": SuppressTokensLogitsProcessor([1])},
            "`logits_processor` must be a `LogitsProcessorList`",
        ),
        ({"generation_config": {"num_steps": 3}}, "`generation_config` must be a `FLMGenerationConfig`"),
        (
            {"generator": 0},
            r"`generator` must be a `torch.Generator`.*For a seed pass `torch.Generator\(\).manual_seed",
        ),
        ({"generator": [0, 1], "num_samples": 2}, "`generator` must be a `torch.Generator`"),
        ({"streamer": True}, "`streamer` must be a streamer"),
        ({"callback": 3}, "`callback` must be a function"),
        ({"prior_state": torch.randn(2, 12, 53).numpy()}, "`prior_state` must be a tensor, got `ndarray`"),
        ({"prior_state": torch.full((2, 12, 32), torch.nan)}, "`prior_state` has values that are not finite"),
        ({"max_new_tokens": 3, "do_sample": True}, "`pipeline_class=modeling_flm.FLMPipeline`"),
    ],
)
def test_bad_arguments(flm, arguments, message):
    with pytest.raises(ValueError, match=message):
        flm.generate(**arguments)


def test_prior_state_sets_the_length(flm):
    flm.generation_config.length = 8
    flm.generation_config.num_samples = 3
    assert flm.generate(num_steps=1).shape == (3, 8)
    assert flm.generate(prior_state=torch.randn(2, 4, 32), num_steps=1).shape == (2, 4)


def test_states_stay_in_float32_under_autocast(flm):
    states = []
    posterior = flm.posterior
    flm.posterior = lambda state, *args, **kwargs: states.append(state) or posterior(state, *args, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flm.generate(num_steps=3, generator=seed())
    flm.generate(num_steps=3, generator=seed())
    assert [state.dtype for state in states] == [torch.float32] * 6
    assert torch.equal(states[0], states[3])


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


def test_generate_is_in_evaluation_mode_and_leaves_the_mode():
    flm = build_flm(dropout=0.5)
    expected = flm.generate(num_samples=4, num_steps=4, generator=seed())
    flm.train()
    flm.layers[0].eval()
    assert torch.equal(flm.generate(num_samples=4, num_steps=4, generator=seed()), expected)
    assert flm.training and flm.layers[1].training and not flm.layers[0].training
    # Nor has a guide dropout.
    guidance = {"guidance_model": build_flm(dropout=0.5, hidden_size=16), "guidance_scale": 1.0}
    expected = flm.generate(num_samples=4, num_steps=4, generator=seed(), **guidance)
    guidance["guidance_model"].train()
    assert torch.equal(flm.generate(num_samples=4, num_steps=4, generator=seed(), **guidance), expected)
    assert guidance["guidance_model"].training
    with pytest.raises(ValueError, match="got unknown arguments"):
        flm.generate(num_texts=4)
    assert flm.training


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_return_sequences", "pass `num_samples`"),
        ("max_new_tokens", "pass `length`"),
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


class TestNotFinite:
    @pytest.mark.parametrize("kind", ["flm", "fmlm", "two_network"])
    @pytest.mark.parametrize(
        "options", [{}, {"sampler_config": BridgeSamplerConfig()}, {"num_rounds": 2}, {"block_length": 5}]
    )
    def test_weights(self, kind, options):
        model = build_model(kind)
        model.generate(num_samples=3, num_steps=2, **options)
        network = model.correction if kind == "two_network" else model
        network.layers[0].mlp.up_proj.weight.data[0] = torch.nan
        with pytest.raises(ValueError, match="The model's output is not finite"):
            model.generate(num_samples=3, num_steps=2, **options)

    def test_padding_does_not_count(self, flm):
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 2:] = mask[2] = 0
        assert flm.generate(attention_mask=mask, num_steps=2, pad_token_id=0)[2].eq(0).all()


class TestTimesteps:
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
