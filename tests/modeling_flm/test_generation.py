"""`generate()`: what it returns, what it refuses, and that it computes what it says."""

import pytest
import torch
from small_models import build_flm, build_model, sampling
from tensors import seed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    SuppressTokensLogitsProcessor,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
)

from modeling_flm import BridgeSamplerConfig, FLMGenerationOutput, utils_flm


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
