"""Classifier-free guidance: away from another prompt, or from no prompt."""

import pytest
import torch
from datasets import Dataset
from small_models import build_flm, build_model

from modeling_flm.flow import flow_map
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, make_flow_batch
from modeling_flm.trainers.batches import stratified_uniforms


SCALE = 1.5


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_flm(per_token_timesteps=True, pad_token_id=0)


def run(model, **options):
    options = {"num_steps": 4, "generator": torch.Generator().manual_seed(0), "guidance_scale": SCALE, **options}
    return model.generate(**options)


@torch.no_grad()
@pytest.mark.parametrize("one_row", [False, True])
def test_equals_dense_guidance(model, one_row):
    known = torch.rand(5, 12) < 0.4
    prompt, negative = torch.randint(53, (2, 5, 12))
    negative = negative[:1] if one_row else negative
    noise, embedding = torch.randn(5, 12, 53), model.state_embedding
    start = noise @ embedding
    tokens = run(
        model,
        input_ids=prompt,
        prompt_mask=known.long(),
        negative_prompt_ids=negative,
        prior_state=torch.cat([start, start], dim=-1),
        return_dict_in_generate=True,
    )
    states = [torch.where(known[..., None], embedding[ids.expand(5, 12)], start) for ids in (prompt, negative)]
    tau = torch.linspace(0, 1, 5)
    for step in range(4):
        times = [tau[index].repeat(5, 12).masked_fill(known, 1.0) for index in (step, step + 1)]
        with_prompt, without = (model(inputs_embeds=state, timesteps=times[0]).logits.softmax(-1) for state in states)
        guided = with_prompt + SCALE * (with_prompt - without)
        s, t = map(model.time_map.tau_to_t, times)
        states = [flow_map(state, guided @ embedding, s, t) for state in states]
    assert torch.equal(tokens.sequences, torch.where(known, prompt, guided.argmax(-1)))
    assert tokens.num_forward_passes.tolist() == [8] * 5


@pytest.mark.parametrize("kind", ["fmlm", "two_network"])
@pytest.mark.parametrize(
    "options", [{"gamma": 0.5}, {"num_rounds": 2}, {"block_length": 5}], ids=lambda o: next(iter(o))
)
def test_samplers_and_batches(kind, options):
    torch.manual_seed(0)
    model = build_model(kind, per_token_timesteps=True)
    prompt = torch.randint(53, (6, 4))
    inputs = {"input_ids": prompt, "negative_prompt_ids": torch.randint(53, (1, 4)), **options}
    first, second = (run(model, batch_size=size, **inputs) for size in (6, 2))
    assert torch.equal(first, second) and torch.equal(first[:, :4], prompt)
    # A scale of 0, or the prompt itself, is no guidance; another negative prompt is.
    unguided = run(model, **inputs, **{"guidance_scale": 0.0})
    inputs["negative_prompt_ids"] = prompt
    assert torch.equal(run(model, **inputs), unguided)
    assert not torch.equal(first, unguided)


def test_padded_prompts(model):
    prompt, negative = torch.randint(1, 53, (2, 2, 4))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    noise = torch.randn(2, 12, 64)
    options = {"attention_mask": mask, "negative_prompt_ids": negative, "noise_source": lambda rows: noise[rows]}
    tokens = run(model, input_ids=prompt, **options)
    options |= {"attention_mask": None, "negative_prompt_ids": negative[:1, 2:]}
    options["noise_source"] = lambda rows: noise[rows]
    assert torch.equal(tokens[:1], run(model, input_ids=prompt[:1, 2:], **options))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"negative_prompt_ids": torch.zeros(1, 3).long()},
            "`negative_prompt_ids` must be tokens in the place of `input_ids`",
        ),
        (
            {"negative_prompt_ids": torch.zeros(2, 4)},
            "`negative_prompt_ids` must be tokens in the place of `input_ids`",
        ),
        ({"input_ids": None}, "`negative_prompt_ids` must be tokens in the place of `input_ids`"),
        ({"negative_prompt_ids": torch.full((2, 4), 99)}, "must be between 0 and 52"),
        ({"guidance_scale": None}, "`negative_prompt_ids` needs a `guidance_scale`"),
        ({"guidance_model": build_flm()}, "two kinds of guidance"),
        ({"negative_prompt_ids": None}, "needs a `guidance_model`, or `negative_prompt_ids`"),
    ],
)
def test_bad_arguments(model, options, message):
    defaults = {"input_ids": torch.ones(2, 4).long(), "negative_prompt_ids": torch.zeros(2, 4).long()}
    with pytest.raises(ValueError, match=message):
        run(model, **{**defaults, **options})


class TestPromptDropout:
    def test_known_tokens_become_padding(self):
        input_ids = torch.randint(1, 50, (400, 10))
        examples = {"input_ids": input_ids, "labels": input_ids}
        arguments = (examples, stratified_uniforms(400, 1, 0), range(400), (0, 0))
        plain = make_flow_batch(*arguments, prompt_fraction=1.0)
        batch = make_flow_batch(*arguments, prompt_fraction=1.0, prompt_dropout=0.25, pad_token_id=0)
        known = plain.labels == -100
        is_dropped = (batch.input_ids != plain.input_ids).any(dim=1)
        assert 70 < is_dropped.sum() < 130
        assert torch.equal(batch.input_ids, plain.input_ids.masked_fill(known & is_dropped[:, None], 0))
        assert torch.equal(batch.labels, plain.labels) and torch.equal(batch.tau_s, plain.tau_s)

    def test_training(self, tmp_path):
        rows = Dataset.from_dict({"input_ids": torch.randint(1, 53, (16, 12)).tolist()})
        options = {"max_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        for flags, pad, message in (
            ({}, 0, "`prompt_dropout` needs prompts"),
            ({"prompt_fraction": 0.5}, None, "a model with a `pad_token_id`"),
        ):
            args = FLMTrainingArguments(tmp_path, prompt_dropout=0.5, **options, **flags)
            with pytest.raises(ValueError, match=message):
                FLMTrainer(build_flm(pad_token_id=pad), args, train_dataset=rows)
        with pytest.raises(ValueError, match="`prompt_dropout` must be in"):
            FLMTrainingArguments(tmp_path, prompt_dropout=2)
        args = FLMTrainingArguments(tmp_path, prompt_dropout=1.0, prompt_fraction=1.0, **options)
        trainer = FLMTrainer(build_flm(pad_token_id=0), args, train_dataset=rows)
        (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        assert (batch.input_ids[batch.tau_s == 1] == 0).all() and (batch.tau_s == 1).any()
        trainer.train()
