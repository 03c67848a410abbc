"""Early stopping: the steps of a settled text end, whatever the other texts of its batch do."""

import pytest
import torch
from small_models import build_flm
from transformers import CompileConfig


NUM_STEPS = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_flm()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # settles some texts early
    return model


def run(model, **options):
    options = {"num_samples": 12, "num_steps": NUM_STEPS, "return_dict_in_generate": True, **options}
    return model.generate(generator=torch.Generator().manual_seed(0), **options)


def entropies(model, state, num_steps):
    """Entropies of the predictions at every step of whole texts, by the definition."""
    values, embedding = [], model.state_embedding.detach()
    tau = torch.linspace(0, 1, num_steps + 1)
    t = model.time_map.tau_to_t(tau)
    for step in range(num_steps):
        probabilities = model(inputs_embeds=state, timesteps=tau[step].repeat(len(state))).logits.softmax(-1)
        values.append(torch.distributions.Categorical(probabilities).entropy())
        share = (t[step + 1] - t[step]) / (1 - t[step])
        state = (1 - share) * state + share * (probabilities @ embedding)
    return torch.stack(values, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"stability_threshold": 3}, {"confidence_threshold": 0.78}, {"stability_threshold": 2, "confidence_threshold": 0.85}])  # fmt: skip
def test_texts_end_at_the_step_that_settles_them(model, options):
    state = torch.randn(12, 12, model.config.vocab_size) @ model.state_embedding
    drafts = run(model, prior_state=state, output_drafts=True).drafts
    same = (drafts[:, 1:] == drafts[:, :-1]).all(dim=2)
    means = entropies(model, state, NUM_STEPS).mean(dim=2)
    expected_steps = []
    for row in range(12):
        for step in range(NUM_STEPS):
            stable = options.get("stability_threshold", 0)
            is_stable = step >= stable and bool(same[row, step - stable : step].all())
            if is_stable and means[row, step] < options.get("confidence_threshold", torch.inf):
                break
        expected_steps.append(step + 1)
    assert 2 < len({*expected_steps}) and min(expected_steps) < NUM_STEPS
    output = run(model, prior_state=state, output_drafts=True, **options)
    assert output.num_forward_passes.tolist() == expected_steps
    assert torch.equal(output.sequences, drafts[torch.arange(12), torch.tensor(expected_steps) - 1])
    assert output.drafts.shape == drafts.shape and torch.equal(output.drafts[:, -1], output.sequences)
    torch.testing.assert_close(output.tokens_per_forward, 12 / output.num_forward_passes)
    by_itself = run(model, prior_state=state, batch_size=1, **options)
    assert torch.equal(by_itself.sequences, output.sequences)
    assert torch.equal(by_itself.num_forward_passes, output.num_forward_passes)


@pytest.mark.parametrize(
    "sampler",
    [
        {"gamma": 0.3, "stability_threshold": 1},
        {"sampler_config": {"_cls_name": "BridgeSamplerConfig"}, "confidence_threshold": 0.6},
    ],
    ids=["gamma", "bridge"],
)
def test_new_noise_and_known_tokens_do_not_depend_on_the_batch(model, sampler):
    known, input_ids = torch.rand(12, 12) < 0.5, torch.randint(model.config.vocab_size, (12, 12))
    options = {"input_ids": input_ids, "prompt_mask": known.long(), **sampler}
    first, second = (run(model, batch_size=size, **options) for size in (12, 5))
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.num_forward_passes, second.num_forward_passes)
    assert len(first.num_forward_passes.unique()) > 1
    assert torch.equal(first.sequences[known], input_ids[known])
    torch.testing.assert_close(first.tokens_per_forward, (~known).sum(dim=1) / first.num_forward_passes)


def test_tokens_after_the_end_do_not_count():
    torch.manual_seed(0)
    model = build_flm(eos_token_id=3, pad_token_id=0)
    model.generation_config.pad_after_eos = True
    output = run(model, num_samples=40, num_steps=3)
    lengths = [row.index(3) + 1 if 3 in row else 12 for row in output.sequences.tolist()]
    assert min(lengths) < max(lengths)
    assert output.tokens_per_forward.tolist() == pytest.approx([length / 3 for length in lengths])


def test_callbacks_and_drafts_see_all_texts(model):
    seen = []
    output = run(model, stability_threshold=1, callback=lambda step, num_steps, tokens: seen.append(tokens.clone()))
    assert all(tokens.shape == (12, 12) for tokens in seen) and torch.equal(seen[-1], output.sequences)
    assert len(seen) == output.num_forward_passes.max() <= NUM_STEPS


def test_values_that_are_not_finite_are_found_before_the_last_step(model):
    broken = build_flm()
    with torch.no_grad():
        broken.lm_head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        run(broken, stability_threshold=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stability_threshold": 0}, "`stability_threshold` must be an integer of at least 1"),
        ({"confidence_threshold": 0}, "`confidence_threshold` must be a number above 0"),
        ({"stability_threshold": 1, "num_rounds": 2}, "`stability_threshold` cannot be combined with rounds"),
        ({"confidence_threshold": 1.0, "compile_config": CompileConfig()}, "cannot be combined with `compile_config`"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **options)
