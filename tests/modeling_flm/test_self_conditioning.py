"""Self-conditioning: the network reads an estimate of the text, in generation the estimate of the step before."""

import pytest
import torch
from datasets import Dataset
from distilling import build_batch, build_trainer, compute_targets, states
from huggingface_hub.errors import StrictDataclassClassValidationError
from small_models import build_flm
from tensors import relative_error
from train_tiny import logged

from modeling_flm import FLMConfig, FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.flow import flow_map
from modeling_flm.hub.export import FlowStep
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainingArguments


@pytest.fixture(scope="module")
def model() -> FLMModel:
    torch.manual_seed(0)
    model = build_flm(self_conditioning=True).eval()
    torch.nn.init.normal_(model.self_conditioning.weight, std=0.5)
    return model


def test_new_models_start_without_it():
    torch.manual_seed(0)
    model, plain = (
        FLMModel(FLMConfig(vocab_size=40, hidden_size=32, num_attention_heads=2, self_conditioning=True)),
        build_flm(),
    )
    assert not model.self_conditioning.weight.any()
    assert "self_conditioning.weight" not in plain.state_dict() and not plain.config.self_conditioning


def reference(model, state, num_steps, num_iterations, known=None, input_ids=None):
    """Euler steps with whole distributions."""
    embedding, estimate = model.state_embedding.detach(), torch.zeros_like(state)
    known = torch.zeros(state.shape[:2], dtype=torch.bool) if known is None else known
    if known.any():
        state = torch.where(known[..., None], embedding[input_ids], state)
    for step in range(num_steps):
        tau, end = (torch.full(state.shape[:2], n / num_steps).masked_fill(known, 1.0) for n in (step, step + 1))
        for _ in range(num_iterations):
            inputs = {"inputs_embeds": state, "timesteps": tau, "estimate": estimate}
            probabilities = model(**inputs).logits.softmax(-1)
            estimate = probabilities @ embedding
        state = flow_map(state, estimate, *(model.time_map.tau_to_t(each) for each in (tau, end)))
    tokens = probabilities.argmax(-1)
    return tokens if input_ids is None else torch.where(known, input_ids, tokens)


@torch.no_grad()
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_generation_carries_the_estimate(model, num_iterations):
    state = torch.randn(6, 12, model.config.vocab_size) @ model.state_embedding
    options = {"num_steps": 4, "num_fixed_point_iterations": num_iterations, "return_dict_in_generate": True}
    output = model.generate(prior_state=state, **options)
    assert torch.equal(output.sequences, reference(model, state, 4, num_iterations))
    assert output.num_forward_passes.tolist() == [4 * num_iterations] * 6
    without = build_flm()
    without.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in without.state_dict()}
    )
    assert not torch.equal(output.sequences, without.generate(prior_state=state, num_steps=4))
    # A text does not depend on its batch
    assert torch.equal(output.sequences, model.generate(prior_state=state, batch_size=2, **options).sequences)
    # Known tokens
    known, input_ids = torch.rand(6, 12) < 0.4, torch.randint(model.config.vocab_size, (6, 12))
    output = model.generate(input_ids, prompt_mask=known.long(), prior_state=state, **options)
    assert torch.equal(output.sequences, reference(model, state, 4, num_iterations, known, input_ids))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"sampler_config": {"_cls_name": "BridgeSamplerConfig"}},
        {"gamma": 0.5},
        {"num_rounds": 3},
        {"block_length": 4},
        {"guidance_scale": 1.0},
        {"reward_scale": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_samplers_use_the_estimate(model, options):
    torch.manual_seed(1)
    inputs = {"num_samples": 4, "num_steps": 3, **options}
    if "guidance_scale" in options:
        inputs["guidance_model"] = build_flm(hidden_size=16)
    if "reward_scale" in options:
        inputs["reward"] = lambda probabilities: probabilities[..., 3].sum(-1)
    seeds = {"generator": torch.Generator().manual_seed(0)}
    first = model.generate(**inputs, **seeds)
    seeds["generator"].manual_seed(0)
    again = model.generate(**inputs, batch_size=2, **seeds)
    assert first.shape == (4, 12) and (torch.equal(first, again) or "reward_scale" in options)
    weight = model.self_conditioning.weight.clone()
    try:
        model.self_conditioning.weight.zero_()
        seeds["generator"].manual_seed(0)
        assert not torch.equal(model.generate(**inputs, **seeds), first)
    finally:
        model.self_conditioning.weight.copy_(weight)


@torch.no_grad()
def test_guidance_by_a_model_with_self_conditioning(model):
    plain = build_flm(hidden_size=16)
    tokens = plain.generate(num_samples=2, num_steps=3, guidance_model=model, guidance_scale=1.0)
    assert tokens.shape == (2, 12)


def test_saved_models_and_flow_maps(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = FLMModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.self_conditioning.weight, model.self_conditioning.weight)
    student = FMLMModel.from_flm(model).eval()
    assert student.self_conditioning is None and torch.equal(student.lm_head.weight, model.lm_head.weight)
    state, tau = torch.randn(2, 12, model.config.hidden_size), torch.tensor([0.2, 0.6])
    with torch.no_grad():
        expected = model(inputs_embeds=state, timesteps=tau).logits
        torch.testing.assert_close(
            student(inputs_embeds=state, timesteps=tau, target_timesteps=torch.ones(2)).logits, expected
        )


def test_bad_combinations(model, tmp_path):
    flm = build_flm()
    with pytest.raises(StrictDataclassClassValidationError, match="`self_conditioning` is for an `FLMConfig`"):
        FMLMConfig(self_conditioning=True)
    with pytest.raises(ValueError, match="`teacher` has `self_conditioning`"):
        FMLMTwoNetworkModel.from_flm(model)
    with pytest.raises(ValueError, match="`num_fixed_point_iterations` needs a model with `self_conditioning`"):
        flm.generate(num_fixed_point_iterations=2)
    with pytest.raises(ValueError, match="`num_fixed_point_iterations` must be an integer of at least 1"):
        model.generate(num_fixed_point_iterations=0)
    state = torch.zeros(1, 12, flm.config.hidden_size)
    with pytest.raises(ValueError, match="`estimate` is for a model with `config.self_conditioning`"):
        flm(inputs_embeds=state, timesteps=torch.zeros(1), estimate=state)
    with pytest.raises(ValueError, match="`model` has `self_conditioning`"):
        FlowStep(model)
    with pytest.raises(ValueError, match="`teacher_iterations` needs a `teacher` with `self_conditioning`"):
        build_trainer(tmp_path, FMLMModel.from_flm(flm), teacher=flm, teacher_iterations=2)
    with pytest.raises(ValueError, match="`teacher_iterations` has no effect with `target='teacher'`"):
        FMLMTrainingArguments(tmp_path, teacher_iterations=2, target="teacher")


class TestTraining:
    def trainer(self, path, **options) -> FLMTrainer:
        torch.manual_seed(0)
        flm = build_flm(self_conditioning=True, dropout=0.1)
        torch.nn.init.normal_(flm.self_conditioning.weight, std=0.5)
        defaults = {
            "max_steps": 8,
            "save_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "use_cpu": True,
        }
        args = FLMTrainingArguments(path, report_to=[], disable_tqdm=True, **{**defaults, **options})
        rows = torch.randint(flm.config.vocab_size, (40, 12)).tolist()
        return FLMTrainer(flm, args, train_dataset=Dataset.from_dict({"input_ids": rows}))

    def test_half_of_the_examples_read_their_own_estimate(self, tmp_path):
        trainer = self.trainer(tmp_path)
        model = trainer.model.eval()
        (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        assert batch.groups == {"self_conditioned": [1, 3]}
        batch = trainer._with_noise(batch)
        with torch.no_grad():
            output = trainer.training_objective(batch)
            state = model.make_state(batch.input_ids, batch.tau_s, batch.noise)
            inputs = {"inputs_embeds": state, "timesteps": batch.tau_s}
            estimate = model(**inputs).logits.softmax(-1) @ model.state_embedding
            estimate[[0, 2]] = 0
            expected = model(**inputs, estimate=estimate, labels=batch.labels).token_losses
        torch.testing.assert_close(output.token_losses, expected, rtol=1e-4, atol=1e-5)

    def test_training_and_resuming(self, tmp_path):
        straight, resumed = self.trainer(tmp_path), self.trainer(tmp_path)
        before = straight.model.self_conditioning.weight.detach().clone()
        straight.train()
        assert not torch.equal(straight.model.self_conditioning.weight, before)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        for name in ("loss", "loss_self_conditioned"):
            assert logged(resumed, name) == logged(straight, name) and len(logged(straight, name)) == 8

    def test_teacher_at_its_fixed_point(self, model, tmp_path):
        trainer = build_trainer(tmp_path, FMLMModel.from_flm(model), teacher=model, teacher_iterations=3)
        noise = torch.randn(4, 12, min(model.config.vocab_size, 2 * model.config.hidden_size))
        tau = torch.tensor([0.1, 0.4, 0.6, 0.9])
        batch = build_batch(torch.randint(model.config.vocab_size, (4, 12)), noise, tau, tau, diagonal=[0, 1, 2, 3])
        target, _ = compute_targets(trainer, batch)
        with torch.no_grad():
            state, estimate = states(trainer, batch)[1], None
            for _ in range(3):
                expected = model(inputs_embeds=state, timesteps=tau, estimate=estimate).logits.softmax(-1)
                estimate = expected @ model.state_embedding
        assert relative_error(target, expected) < 1e-4
