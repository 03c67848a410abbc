"""Distribution matching: its loss against a dense reference, the auxiliary denoiser, resuming, and what it does to a distribution."""

import pytest
import torch
from datasets import Dataset
from distilling import build_batch
from small_models import build_flm
from tensors import relative_error
from train_tiny import distillation, launch, logged
from transformers import AutoModel

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.trainers import (
    DistributionMatchingTrainer,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
)
from modeling_flm.trainers.batches import MatchingTimes, stratified_uniforms


PRESET = "distribution_matching"
OPTIONS = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


def build_trainer(path, model, teacher, dataset=None, **options) -> DistributionMatchingTrainer:
    args = FMLMTrainingArguments.from_preset(PRESET, output_dir=path, **{**OPTIONS, **options})
    return DistributionMatchingTrainer(model, args, teacher=teacher, train_dataset=dataset)


def test_times():
    times = MatchingTimes(boundary_probability=0.25, num_start_times=4)(stratified_uniforms(4000, 3, 0), range(4000))
    assert {time: (times.tau_s == time).sum().item() for time in (0.0, 0.25, 0.5, 0.75)} == pytest.approx(
        dict.fromkeys((0.0, 0.25, 0.5, 0.75), 1000), abs=100
    )
    assert (times.tau_t == 1).all() and times.tau_u.min() < 0.021 and times.tau_u.max() > 0.979
    assert (times.tau_s[times.groups["boundary"]] == 0).all() and len(times.groups["boundary"]) == 1000


@pytest.mark.parametrize("vocab_size", [50, 200], ids=["small vocabulary", "larger than the states"])
def test_loss_and_gradient_equal_dense_ones(vocab_size, tmp_path):
    torch.manual_seed(0)
    options = {"vocab_size": vocab_size, "dropout": 0.0, "per_token_timesteps": True}
    teacher = build_flm(**options).eval()
    student = FMLMModel.from_flm(build_flm(**options))
    trainer = build_trainer(tmp_path, student, teacher)
    for parameter in (*trainer.auxiliary.lm_head.parameters(), *student.target_time_embedding.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    input_ids, known = torch.randint(vocab_size, (4, 6)), torch.rand(4, 6) < 0.3
    known[:, 0], known[0] = False, False
    size = trainer._noise_size()
    noise, tau_s, tau_u = torch.randn(4, 6, size), torch.tensor([0.0, 0.0, 0.5, 0.25]), torch.rand(4)
    batch = build_batch(input_ids, noise, tau_s, torch.ones(4), tau_u, known)
    output = trainer.training_objective(batch)
    output.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()

    # The same with whole distributions
    joint_noise = trainer._get_joint_noise()
    state = student.make_state(input_ids, batch.tau_s, noise[..., : size // 2], joint_noise)
    texts = student(inputs_embeds=state, timesteps=batch.tau_s, target_timesteps=batch.tau_t).logits.softmax(-1)
    embedding = teacher.embed_tokens.weight.detach().double()
    one_hot = torch.nn.functional.one_hot(input_ids, vocab_size).double()
    clean = torch.where(known[..., None], one_hot, texts.detach().double()) @ embedding
    u = teacher.time_map.tau_to_t(batch.tau_u).double()[..., None]
    (index,) = joint_noise.indices_of(teacher)
    noised = (1 - u) * (noise[..., size // 2 :].double() @ joint_noise.factor(index).double()) + u * clean
    with torch.no_grad():
        times = {"timesteps": batch.tau_u, "target_timesteps": batch.tau_u}
        data, own = (
            each(inputs_embeds=noised.float(), **times).logits.softmax(-1) for each in (teacher, trainer.auxiliary)
        )
    # Differences that the states of the teacher do not show have no gradient
    basis = torch.linalg.qr(embedding).Q if vocab_size > embedding.shape[1] else torch.eye(vocab_size).double()
    difference = (own - data).double() @ basis @ basis.T
    counted = ~known
    distances = ((texts.detach() - data).abs().sum(-1) * counted).sum(1) / counted.sum(1)
    products = (texts * difference).sum(-1) / distances[:, None]
    expected = (products * counted).sum() / counted.sum()
    torch.testing.assert_close(output.loss.double(), expected.double(), rtol=1e-3, atol=1e-6)
    expected.backward()
    for name, gradient in gradients.items():
        assert relative_error(gradient, student.get_parameter(name).grad) < 2e-3, name
    assert all(parameter.grad is None for parameter in (*teacher.parameters(), *trainer.auxiliary.parameters()))


def test_auxiliary_denoiser_learns_the_texts_of_the_model(tmp_path):
    options = {"max_steps": 30, "save_strategy": "no", "eval_strategy": "no", "auxiliary_learning_rate": 3e-3}
    trainer = distillation(tmp_path, PRESET, learning_rate=0.0, lr_scheduler_type="constant", **options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    teacher = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    losses = logged(trainer, "loss_auxiliary")
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5  # texts of an untrained model are nearly random
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.teacher.state_dict().items())
    assert torch.equal(trainer.auxiliary.embed_tokens.weight, trainer.teacher.embed_tokens.weight)
    assert not torch.equal(trainer.auxiliary.lm_head.weight, trainer.teacher.lm_head.weight)


def test_resume_from_checkpoint_equals_uninterrupted_training(tmp_path):
    straight = distillation(tmp_path, PRESET, dropout=0.1)
    straight.train()
    resumed = distillation(tmp_path, PRESET, dropout=0.1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name in ("loss", "loss_auxiliary", "eval_loss"):
        assert logged(resumed, name) == logged(straight, name) != []
    for first, second in ((straight.model, resumed.model), (straight.auxiliary, resumed.auxiliary)):
        assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    (tmp_path / "checkpoint-10" / "auxiliary.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-10 lacks auxiliary.safetensors"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_second_training_starts_with_a_new_auxiliary_denoiser(tmp_path):
    trainer = distillation(tmp_path, PRESET, max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.train()
    used = trainer.auxiliary
    trainer.train()
    assert trainer.auxiliary is not used


def test_accumulation_and_large_batches_agree(tmp_path):
    options = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no", "prompt_fraction": 0.5}
    small = distillation(tmp_path, PRESET, gradient_accumulation_steps=2, **options)
    large = distillation(tmp_path, PRESET, per_device_train_batch_size=16, **options)
    small.train(), large.train()
    for name in ("loss_auxiliary", "loss_boundary", "loss_off_diagonal"):
        assert logged(small, name) == pytest.approx(logged(large, name), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "preset": PRESET, "distill": True}
    (one,) = launch(tmp_path / "one", 1, per_device_train_batch_size=16, **options)
    two = launch(tmp_path / "two", 2, per_device_train_batch_size=8, **options)
    for name in ("loss", "loss_auxiliary", "grad_norm"):
        assert logged(two[0]["log"], name) == pytest.approx(logged(one["log"], name), rel=2e-3, abs=1e-5)


def test_bad_combinations(flm, tmp_path):
    student = FMLMModel.from_flm(flm)
    with pytest.raises(ValueError, match="`teacher` is missing"):
        build_trainer(tmp_path, student, None)
    with pytest.raises(ValueError, match="`teacher` must be an `FLMModel`"):
        build_trainer(tmp_path, student, FMLMTwoNetworkModel.from_flm(flm))
    with pytest.raises(TypeError, match="`model`"):
        build_trainer(tmp_path, FMLMTwoNetworkModel.from_flm(flm), flm)
    with pytest.raises(ValueError, match="`target='semigroup'` is for `FMLMTrainer`"):
        DistributionMatchingTrainer(student, FMLMTrainingArguments(tmp_path, **OPTIONS), teacher=flm)
    args = FMLMTrainingArguments.from_preset(PRESET, output_dir=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="is for `DistributionMatchingTrainer`"):
        FMLMTrainer(student, args, teacher=flm)
    for options, message in (
        ({"num_start_times": 1}, "needs `boundary_probability=1`"),
        ({"auxiliary_updates": 0}, "`auxiliary_updates` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FMLMTrainingArguments.from_preset(PRESET, output_dir=tmp_path, **options)


@pytest.mark.slow
def test_fewer_impossible_texts(tmp_path):
    """Eight texts of two equal tokens. A short distillation mixes them in nearly a tenth of the samples."""
    num_tokens = 8
    dataset = Dataset.from_dict({"input_ids": [[token, token] for token in range(num_tokens)] * 100})
    options = {**OPTIONS, "per_device_train_batch_size": 64, "logging_steps": 100, "ema_decay": 0.98}
    sizes = {"vocab_size": num_tokens, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    flm = build_flm(**sizes, max_position_embeddings=2, dropout=0.0, attn_logit_softcapping=None)
    settings = {**options, "max_steps": 400, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    trainer = FLMTrainer(
        FLMModel(flm.config), FLMTrainingArguments(tmp_path / "flm", **settings), train_dataset=dataset
    )
    trainer.train()
    trainer.save_model()
    teacher = FLMModel.from_pretrained(tmp_path / "flm")
    settings["max_steps"] = 200
    args = FMLMTrainingArguments(tmp_path / "fmlm", boundary_probability=0.25, **settings)
    trainer = FMLMTrainer(FMLMModel.from_flm(teacher), args, teacher=teacher, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    options |= {"max_steps": 300, "learning_rate": 1e-3, "auxiliary_updates": 4, "auxiliary_learning_rate": 3e-3}
    student = AutoModel.from_pretrained(tmp_path / "fmlm")
    trainer = build_trainer(tmp_path / "matched", student, teacher, dataset, **options)
    trainer.train()
    trainer.save_model()

    def figures(folder, num_steps):
        generator = torch.Generator().manual_seed(0)
        model = FMLMModel.from_pretrained(tmp_path / folder)
        tokens = model.generate(num_samples=4000, num_steps=num_steps, generator=generator)
        possible = tokens[:, 0] == tokens[:, 1]
        counts = torch.bincount(tokens[possible, 0], minlength=num_tokens)
        return 1 - possible.double().mean().item(), (counts / counts.sum()).tolist()

    for num_steps in (1, 4):
        (before, _), (after, shares) = (figures(folder, num_steps) for folder in ("fmlm", "matched"))
        assert after < 0.7 * before
        assert min(shares) > 0.4 / num_tokens  # no text is lost
