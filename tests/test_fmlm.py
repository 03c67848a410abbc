"""Flow maps: the models, the targets against published values and an exact solution, training."""

import json
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from distilling import build_batch, build_trainer, compute_loss, compute_targets, states
from exact_flows import ExactFlowMap
from small_models import build_flm, sampling, two_time_denoiser
from tensors import relative_error
from train_tiny import distillation, launch, logged
from transformers import AutoModel

from modeling_flm import FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkConfig, FMLMTwoNetworkModel
from modeling_flm.flow import flow_map, interpolate
from modeling_flm.joint_noise import JointNoise
from modeling_flm.losses import softmax_divergence
from trainers import (
    PRESETS,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    fmlm_trainer,
    objectives,
)


def divergence(kind, target, delta):
    """Written out from a whole two-time denoiser."""
    if kind == "squared_error":
        return (target - delta).square().sum(-1)
    entropy = torch.xlogy(target, target).sum(-1) if kind == "kl" else 0.0
    return entropy - (target * delta.log()).sum(-1)


class TestModels:
    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_starts_as_its_teacher(self, flm, model_class):
        model = model_class.from_flm(flm).eval()
        tau_s, tau_t = torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0])
        input_ids = torch.randint(53, (3, 12))
        delta = two_time_denoiser(model(input_ids, tau_s, tau_t))
        assert torch.equal(delta, flm(input_ids, tau_s).logits.softmax(-1))
        prior = torch.randn(3, 12, 53)
        expected = flm.generate(prior_state=prior, num_steps=3)
        assert torch.equal(model.generate(prior_state=prior, num_steps=3), expected)

    def test_copies_what_the_teacher_is(self, flm):
        flm.config.eos_token_id = 2
        student = FMLMModel.from_flm(flm, dropout=0.0, learned_loss_weighting=True)
        assert student.config.model_type == "fmlm" and student.config.eos_token_id == 2
        assert student.config.dropout == 0.0 and student.config.hidden_size == 32
        assert student.embed_tokens.weight.data_ptr() != flm.embed_tokens.weight.data_ptr()
        assert not student.target_time_embedding.linear_2.weight.any()
        assert student.target_time_embedding.linear_1.weight.any()
        with pytest.raises(ValueError, match="FMLMConfig has no setting dorpout"):
            FMLMModel.from_flm(flm, dorpout=0.0)
        for size in (1, 3):
            with pytest.raises(ValueError, match="must leave all sizes as they are"):
                FMLMModel.from_flm(flm, num_hidden_layers=size)
        assert FMLMTwoNetworkModel.from_flm(flm).config.learned_loss_weighting
        sdpa = FMLMModel.from_flm(build_flm(attn_logit_softcapping=None))
        assert sdpa.config._attn_implementation == "sdpa"

    def test_one_step_by_default(self, flm):
        for model in (FMLMModel.from_flm(flm), FMLMTwoNetworkModel.from_flm(flm)):
            assert model.generate(return_dict_in_generate=True).num_forward_passes.eq(1).all()
            assert model.generate(num_steps=3, return_dict_in_generate=True).num_forward_passes.eq(3).all()

    @pytest.mark.parametrize(
        "model_class, config_class", [(FMLMModel, FMLMConfig), (FMLMTwoNetworkModel, FMLMTwoNetworkConfig)]
    )
    def test_saves_loads_checkpoints_and_compiles(self, model_class, config_class, flm, tmp_path):
        model = model_class.from_flm(flm, learned_loss_weighting=True).eval()
        torch.nn.init.normal_(
            model.get_submodule("correction" if "Two" in model_class.__name__ else "").lm_head.weight
        )
        batch = {
            "input_ids": torch.randint(53, (3, 12)),
            "timesteps": torch.tensor([0.1, 0.5, 0.7]),
            "target_timesteps": torch.tensor([0.1, 0.9, 1.0]),
        }
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
            "AutoConfig": f"configuration_flm.{config_class.__name__}",
            "AutoModel": f"modeling_flm.{model_class.__name__}",
        }
        reloaded = AutoModel.from_pretrained(tmp_path)
        assert type(reloaded) is model_class and type(reloaded.config) is config_class
        output, expected = reloaded(**batch), model(**batch)
        assert torch.equal(two_time_denoiser(output), two_time_denoiser(expected))
        log_weights = [each.log_loss_weight(batch["timesteps"]) for each in (reloaded, model)]
        assert torch.equal(*log_weights) and log_weights[0].shape == (3,)
        assert reloaded.generation_config.num_steps == 1
        if model_class is FMLMTwoNetworkModel:
            reloaded.train()
            assert not any(p.requires_grad for p in reloaded.flow.parameters()) and not reloaded.flow.training
            assert all(p.requires_grad for p in reloaded.correction.parameters()) and reloaded.correction.training
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            output = compiled(**batch)
            torch.testing.assert_close(two_time_denoiser(output), two_time_denoiser(expected), rtol=1e-4, atol=1e-4)
        noise = torch.randn(3, 12, 53 if model_class is FMLMTwoNetworkModel else 32)
        input_ids = batch.pop("input_ids")

        def run():
            torch.manual_seed(0)
            state = model.make_state(input_ids, batch["timesteps"], noise)
            two_time_denoiser(model(inputs_embeds=state, **batch)).square().sum().backward()

        model.train()
        run()
        gradient = model.embeddings[-1].weight.grad.clone()
        model.zero_grad()
        model.activation_checkpointing_enable()
        run()
        torch.testing.assert_close(model.embeddings[-1].weight.grad, gradient)

    @pytest.mark.parametrize("model_class", [FMLMModel, FMLMTwoNetworkModel])
    def test_bfloat16(self, flm, model_class, tmp_path):
        flm.save_pretrained(tmp_path / "flm")
        teacher = FLMModel.from_pretrained(tmp_path / "flm", dtype=torch.bfloat16)
        model = model_class.from_flm(teacher, learned_loss_weighting=True).eval()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        batch = (torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7]), torch.tensor([0.1, 0.9, 1.0]))
        expected = teacher(*batch[:2]).logits
        tolerance = 0.03 * expected.abs().max().item()
        delta = two_time_denoiser(model(*batch))
        torch.testing.assert_close(delta.log(), expected.log_softmax(-1), rtol=0, atol=tolerance)
        model.save_pretrained(tmp_path / "model")
        low = model_class.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
        torch.testing.assert_close(two_time_denoiser(low(*batch)).log(), delta.log(), rtol=0, atol=tolerance)
        assert low.generate(num_samples=2).shape == (2, 12)

    def test_loss_against_labels_is_a_cross_entropy(self, flm):
        input_ids, tau = torch.randint(53, (3, 12)), torch.tensor([0.1, 0.5, 0.7])
        expected = flm(input_ids, tau, labels=input_ids).loss
        for model in (FMLMModel.from_flm(flm), FMLMTwoNetworkModel.from_flm(flm)):
            loss = model.eval()(input_ids, tau, torch.ones(3), labels=input_ids).loss
            torch.testing.assert_close(loss, expected)

    def test_needs_the_time_to_go_to(self, flm):
        with pytest.raises(ValueError, match="Pass `target_timesteps`"):
            FMLMModel.from_flm(flm)(torch.ones(1, 3).long(), torch.rand(1))

    def test_processors_bind_the_correction_too(self, flm):
        from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

        model = FMLMTwoNetworkModel.from_flm(flm).eval()
        torch.nn.init.normal_(model.correction.lm_head.weight, std=10)
        tokens = model.generate(num_samples=20, num_steps=2, generator=torch.Generator().manual_seed(0))
        banned = tokens.unique()[:5].tolist()
        processor = LogitsProcessorList([SuppressTokensLogitsProcessor(banned, device="cpu")])
        tokens = model.generate(num_samples=20, num_steps=2, logits_processor=processor)
        assert not torch.isin(tokens, torch.tensor(banned)).any()


class TestPublishedValues:
    values = oracle.values()

    def trainer(self, tmp_path, path, model, teacher=None, **options) -> FMLMTrainer:
        trainer = build_trainer(tmp_path, model, teacher, **options)
        if path == "compiled":
            trainer._compile_options = {"backend": "aot_eager"}
            for network in trainer._networks():
                trainer._compile_regions(network)
        return trainer

    def batch(self, tau_s, tau_t, tau_u=None, **kinds):
        # V is below the joint width of two networks: projected noise is one-hot noise.
        return build_batch(self.values["input_ids"], self.values["noise"], tau_s, tau_t, tau_u, **kinds)

    def forward(self, trainer, batch):
        return trainer.model(
            inputs_embeds=states(trainer, batch)[0], timesteps=batch.tau_s, target_timesteps=batch.tau_t
        )

    def test_two_networks(self, tmp_path, path):
        values, model = self.values, oracle.two_network_fmlm()
        trainer = self.trainer(tmp_path, path, model, divergence="squared_error", diagonal_fraction=0.0)
        batch = self.batch(values["stage1.tau_s"], values["stage1.tau_t"], off_diagonal=[0, 2], boundary=[1])
        output = self.forward(trainer, batch)
        log_weight = model.log_loss_weight(batch.tau_s).detach()
        torch.testing.assert_close(log_weight, values["stage1.log_weight"], rtol=1e-4, atol=1e-5)
        hidden_states = output.last_hidden_state.chunk(2, dim=-1)[1]
        assert relative_error(model.correction.lm_head(hidden_states), values["stage1.correction"]) < 1e-4
        target, weight = compute_targets(trainer, batch)
        assert torch.equal(weight, torch.ones(3))
        losses = divergence("squared_error", target, output.probabilities)
        losses = torch.exp(-log_weight)[:, None] * losses + log_weight[:, None]
        assert relative_error(losses, values["stage1.loss_per_token"]) < 3e-3
        # Evaluation is by the loss itself, which the learned weight cannot lower.
        weight = log_weight[:, None]
        model.train()
        assert compute_loss(trainer, batch)[0].item() == pytest.approx(losses.mean().item(), rel=1e-4)
        model.eval()
        unweighted = ((losses - weight) * weight.exp()).mean().item()
        assert compute_loss(trainer, batch)[0].item() == pytest.approx(unweighted, rel=1e-4)

    def test_second_stage(self, tmp_path, path):
        values, model = self.values, oracle.fmlm()
        options = {"target": "teacher", "divergence": "squared_error", "diagonal_fraction": 0.0}
        trainer = self.trainer(tmp_path, path, model, teacher=oracle.two_network_fmlm(), **options)
        batch = self.batch(values["stage2.tau_s"], values["stage2.tau_t"])
        logits = self.forward(trainer, batch).logits
        assert relative_error(logits, values["stage2.logits"]) < 1e-4
        target, weight = compute_targets(trainer, batch)
        losses = weight[:, None] * divergence("squared_error", target, logits.softmax(-1))
        assert relative_error(losses, values["stage2.loss_per_token"]) < 3e-3
        loss, output = compute_loss(trainer, batch)
        assert relative_error(output.token_losses, values["stage2.loss_per_token"]) < 3e-3
        assert loss.item() == pytest.approx(values["stage2.loss_per_token"].mean().item(), rel=3e-3)

    @pytest.mark.parametrize("stage, build_model", [("stage1", oracle.two_network_fmlm), ("stage2", oracle.fmlm)])
    @pytest.mark.parametrize("num_steps", [1, 2, 4])
    def test_tokens(self, stage, build_model, num_steps, path):
        tokens = build_model().generate(prior_state=self.values["prior_state"], num_steps=num_steps, **sampling(path))
        assert torch.equal(tokens, self.values[f"{stage}.tokens_{num_steps}"])

    def test_semigroup_and_diagonal(self, tmp_path, path):
        values = self.values
        trainer = self.trainer(tmp_path, path, oracle.fmlm(), teacher=oracle.flm())
        tau_s, tau_u, tau_t = (values[f"two_time.tau_{name}"] for name in "sut")
        batch = self.batch(tau_s, tau_t, tau_u)
        log_delta = self.forward(trainer, batch).logits.log_softmax(-1)
        assert relative_error(log_delta, values["two_time.log_delta_st"]) < 1e-4
        target, weight = compute_targets(trainer, batch)
        assert relative_error(target, values["semigroup.target"]) < 1e-4
        assert torch.equal(weight, torch.ones(3))
        for kind in ("cross_entropy", "kl", "squared_error"):
            losses = divergence(kind, target, log_delta.exp())
            assert relative_error(losses, values[f"semigroup.{kind}_per_token"]) < 3e-3
            trainer.args.divergence = kind
            losses = compute_loss(trainer, batch)[1].token_losses
            assert relative_error(losses, values[f"semigroup.{kind}_per_token"]) < 3e-3

        batch = self.batch(tau_s, tau_s, diagonal=[0, 1, 2])
        target = compute_targets(trainer, batch)[0]
        assert relative_error(target, values["diagonal.target"]) < 1e-4
        log_delta = self.forward(trainer, batch).logits.log_softmax(-1)
        losses = divergence("cross_entropy", target, log_delta.exp())
        assert relative_error(losses, values["diagonal.cross_entropy_per_token"]) < 3e-3

    @pytest.mark.parametrize("target", ["lagrangian", "eulerian"])
    def test_derivatives(self, target, tmp_path, path):
        values, options = self.values, {"target": target, "divergence": "squared_error", "boundary_probability": 0.0}
        trainer = self.trainer(tmp_path, path, oracle.fmlm(), teacher=oracle.flm(), **options)
        rows = values["jvp_rows"].tolist()
        tau_s, tau_t = values["two_time.tau_s"], values["two_time.tau_t"]
        for name, tau in (("s", tau_s), ("t", tau_t)):
            time_map = trainer.model.time_map
            factor = time_map.dtau_dt(time_map.tau_to_t(tau[rows]))
            torch.testing.assert_close(factor, values[f"dtau_dt_at_{name}"], rtol=1e-4, atol=0)
        batch = self.batch(tau_s, tau_t, off_diagonal=rows)
        value = compute_targets(trainer, batch)[0][rows]
        expected = values[f"{target}.target"]
        assert (
            relative_error(value, objectives.project_to_simplex(expected) if target == "lagrangian" else expected)
            < 1e-4
        )


class TestExactSolution:
    tau_s = torch.tensor([0.02, 0.1, 0.3, 0.5], dtype=torch.float64)
    tau_t = torch.tensor([0.3, 0.8, 0.5, 0.9], dtype=torch.float64)

    @pytest.mark.parametrize("target", ["semigroup", "lagrangian", "eulerian"])
    @pytest.mark.parametrize("with_teacher", [True, False])
    def test_is_a_fixed_point(self, target, with_teacher, tmp_path):
        model = ExactFlowMap()
        options = {"target": target, "divergence": "squared_error", "boundary_probability": 0.0}
        trainer = build_trainer(tmp_path, model, teacher=ExactFlowMap() if with_teacher else None, **options)
        input_ids = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]])
        noise = torch.randn(4, 2, 2, dtype=torch.float64)
        tau_u = self.tau_s + 0.3 * (self.tau_t - self.tau_s)
        batch = build_batch(input_ids, noise, self.tau_s, self.tau_t, tau_u)
        value = compute_targets(trainer, batch)[0]
        state = states(trainer, batch)[0]
        delta = model.posterior(state, self.tau_s, self.tau_t).dense()
        assert value.dtype == torch.float64
        # Semigroup: exact. The derivatives go through the table of the time map, which is exact to 1e-5.
        torch.testing.assert_close(value, delta, rtol=0, atol=1e-8 if target == "semigroup" else 2e-5)
        # which is no accident of a constant map
        denoised = model.posterior(state, self.tau_s, self.tau_s).dense()
        assert (delta - denoised).abs().max() > 1e-2

    @pytest.mark.parametrize("target", ["semigroup", "lagrangian", "eulerian"])
    def test_is_a_fixed_point_with_known_tokens(self, target, tmp_path):
        texts = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        flow_maps = [ExactFlowMap(texts, (0.25, 0.05, 0.1, 0.15, 0.02, 0.2, 0.13, 0.1)) for _ in range(2)]
        options = {"target": target, "divergence": "squared_error", "boundary_probability": 0.0}
        trainer = build_trainer(tmp_path, flow_maps[0], teacher=flow_maps[1], **options)
        input_ids = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 0]])
        known = torch.tensor([[False, True, False], [True, False, False], [False, False, False], [False, False, True]])
        tau_u = self.tau_s + 0.3 * (self.tau_t - self.tau_s)
        noise = torch.randn(4, 3, 2, dtype=torch.float64)
        batch = build_batch(input_ids, noise, self.tau_s, self.tau_t, tau_u, known)
        value = compute_targets(trainer, batch)[0]
        state = states(trainer, batch)[0]
        assert torch.equal(state[known], torch.eye(2, dtype=torch.float64)[input_ids[known]])
        delta = flow_maps[0].posterior(state, batch.tau_s, batch.tau_t).dense()
        tolerance = 1e-8 if target == "semigroup" else 2e-5
        torch.testing.assert_close(value[~known], delta[~known], rtol=0, atol=tolerance)
        others = flow_maps[0].posterior(state, self.tau_s, self.tau_t).dense()
        assert (delta - others)[[0, 1, 3]][~known[[0, 1, 3]]].abs().max() > 1e-2

    def test_samples_have_the_distribution_of_the_data(self):
        model = ExactFlowMap()
        x = torch.randn(4000, 2, 2, dtype=torch.float64)
        zero, late = torch.zeros(4000, dtype=torch.float64), torch.full((4000,), 0.9999, dtype=torch.float64)
        delta = model.posterior(x, zero, late).dense()
        tokens = delta.argmax(-1)
        assert (tokens[:, 0] == tokens[:, 1]).all()
        share = (tokens[:, 0] == 0).double().mean().item()
        assert abs(share - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 4000) + 1e-3


def test_projection_keeps_a_nan_visible():
    assert objectives.project_to_simplex(torch.tensor([[float("nan"), 0.0, 1.0]])).isnan().any()


def test_projection_to_the_simplex_is_the_nearest_point():
    x = torch.randn(50, 7, dtype=torch.float64) * 2
    projected = objectives.project_to_simplex(x)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(50, dtype=torch.float64))
    # Optimality: (x - p) · (q - p) <= 0 for every q of the simplex, that is for its vertices.
    gaps = torch.einsum("nv,nqv->nq", x - projected, torch.eye(7, dtype=torch.float64) - projected[:, None])
    assert gaps.max() < 1e-12
    assert (
        torch.equal(objectives.project_to_simplex(projected), projected)
        or (objectives.project_to_simplex(projected) - projected).abs().max() < 1e-12
    )


class TestTimes:
    def draw(self, tmp_path, flm, num=4000, **options):
        trainer = build_trainer(tmp_path, FMLMModel.from_flm(flm), teacher=flm, **options)
        from trainers.batches import stratified_uniforms

        return trainer._draw_times(stratified_uniforms(num, 4, 0), range(num))

    def test_kinds(self, tmp_path, flm):
        times, rows = self.draw(tmp_path, flm, diagonal_fraction=0.25, boundary_probability=0.1)
        assert len(rows["diagonal"]) == 1000 and rows["diagonal"][:3] == [3, 7, 11]
        assert abs(len(rows["boundary"]) - 300) < 5 * math.sqrt(300)
        assert sorted(sum(rows.values(), [])) == list(range(4000))
        s, u, t = (times[f"tau_{name}"] for name in "sut")
        assert torch.equal(s[rows["diagonal"]], t[rows["diagonal"]])
        assert (s[rows["boundary"]] == 0).all() and (t[rows["boundary"]] == 1).all()
        off = rows["off_diagonal"]
        assert (t[off] - s[off] > 9e-4).all() and (s >= 0).all() and (t <= 1).all()
        torch.testing.assert_close(u, (s + t) / 2)

    def test_distributions(self, tmp_path, flm):
        options = {"diagonal_fraction": 0.0, "boundary_probability": 0.0}
        times, _ = self.draw(tmp_path, flm, **options)
        s, t = times["tau_s"].double(), times["tau_t"].double()
        # d ~ U(0, 1), s ~ U(0, 1 - d): means 1/2 and 1/4
        assert abs((t - s).mean() - 0.5) < 0.01 and abs(s.mean() - 0.25) < 0.01
        times, _ = self.draw(tmp_path, flm, time_sampling="uniform_pair", intermediate_time="random", **options)
        s, u, t = (times[f"tau_{name}"].double() for name in "sut")
        assert abs(s.mean() - 1 / 3) < 0.01 and abs(t.mean() - 2 / 3) < 0.01
        fraction = (u - s) / (t - s)
        assert abs(fraction.mean() - 0.5) < 0.01 and abs(fraction.var() - 1 / 12) < 0.01


class TestTraining:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_train(self, preset, tmp_path):
        trainer = distillation(tmp_path, preset, max_steps=50, eval_steps=25, save_strategy="no")
        before = trainer.evaluate()["eval_loss"]
        frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        kinds = {"two_network", "second_stage"} & {preset}
        expected = {"loss_off_diagonal"} if kinds else {"loss_diagonal", "loss_off_diagonal"}
        for prefix in ("", "eval_"):
            assert all(logged(trainer, prefix + name) for name in expected)
        assert bool(logged(trainer, "loss_diagonal")) == (not kinds)
        assert all(torch.equal(p, trainer.model.get_parameter(name)) for name, p in frozen.items())
        trainer.save_model()
        tokens = AutoModel.from_pretrained(tmp_path).generate(num_samples=3)
        assert tokens.shape == (3, 10)

    @pytest.mark.parametrize(
        "options",
        [
            {"target": "lagrangian"},
            {"target": "lagrangian", "divergence": "kl", "target_network": "ema"},
            {"target": "eulerian", "divergence": "squared_error", "boundary_probability": 0.0},
            {"target_network": "ema", "intermediate_time": "random", "time_sampling": "uniform_pair"},
        ],
    )
    def test_other_objectives_train(self, options, tmp_path):
        trainer = distillation(tmp_path, max_steps=20, save_strategy="no", eval_steps=20, **options)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before

    def test_targets_come_from_the_chosen_network(self, tmp_path, monkeypatch):
        # V is above the joint width, so that the noise has another size with the average among the networks.
        for choice, expected in (("student", {"student"}), ("ema", {"average"})):
            flm = build_flm(vocab_size=200, hidden_size=16)
            options = {"max_steps": 4, "target_network": choice, "eval_strategy": "steps", "eval_steps": 2}
            options.update(diagonal_fraction=0.0, save_strategy="no", per_device_train_batch_size=4)
            dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 40})
            trainer = build_trainer(tmp_path, FMLMModel.from_flm(flm, dropout=0.5), flm, dataset, **options)
            used, was_training = {"train": set(), "evaluate": set()}, set()

            def spy(network, *args, trainer=trainer, used=used, was_training=was_training):
                mode = "evaluate" if trainer.ema.is_applied else "train"
                used[mode].add("student" if network is trainer.model else "average")
                was_training.add(network.training)
                return objectives.semigroup_target(network, *args)

            monkeypatch.setattr(fmlm_trainer, "semigroup_target", spy)
            trainer.train()
            assert used == {"train": expected, "evaluate": {"student"}}
            assert was_training == {False}, "targets were made with dropout"

    def test_mixed_precision_keeps_states_in_float32(self, tmp_path, monkeypatch):
        seen, trainers = {}, {}
        for name in ("bf16", "float32"):
            options = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "bf16": name == "bf16"}
            each = trainers[name] = distillation(tmp_path, **options)

            def spy(network, state, *args, name=name, posterior_of=objectives.posterior_of):
                value = posterior_of(network, state, *args)
                seen.setdefault(name, []).append((state, value.dense()))
                return value

            with monkeypatch.context() as patch:
                patch.setattr(fmlm_trainer, "posterior_of", spy)
                each.train()
        (state, delta), (expected_state, expected_delta) = seen["bf16"][0], seen["float32"][0]
        assert torch.equal(state, expected_state)
        assert not torch.equal(delta, expected_delta)  # the blocks did run in bfloat16
        torch.testing.assert_close(delta, expected_delta, rtol=0, atol=0.02)
        losses = [logged(trainers[name], "train_loss") for name in ("bf16", "float32")]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)

    @pytest.mark.parametrize(
        "options",
        [
            {"preset": "single_stage"},
            {"preset": "second_stage"},
            pytest.param({"preset": "two_network", "max_steps": 50}, marks=pytest.mark.slow),
            pytest.param({"target": "lagrangian"}, marks=pytest.mark.slow),
            {"target": "eulerian", "divergence": "squared_error", "boundary_probability": 0.0},
        ],
        ids=["semigroup", "teacher", "two_network", "lagrangian", "eulerian"],
    )
    def test_teacher_in_bfloat16_trains_on_the_states_of_float32(self, options, tmp_path):
        seen, options = {}, {"max_steps": 20, "eval_steps": 20, "save_strategy": "no", **options}
        for name, dtype in (("low", torch.bfloat16), ("exact", torch.float32)):
            trainer = distillation(tmp_path, frozen_dtype=dtype, **options)
            network = trainer.model.flow if trainer.teacher is None else trainer.teacher
            if name == "exact":
                network.to(torch.bfloat16).float()  # the same weights, without rounding errors of their own
            states = seen[name] = []
            network.encode = lambda state, *args, f=network.encode, states=states: (
                states.append(state) or f(state, *args)
            )
            before = trainer.evaluate()["eval_loss"]
            trainer.train()
            assert trainer.evaluate()["eval_loss"] < before
            assert {parameter.dtype for parameter in network.parameters()} == {dtype}
        assert len(seen["low"]) == len(seen["exact"]) > 0
        assert {state.dtype for state in seen["low"]} == {torch.float32}
        # Of the first batch, for which the students are the same; the second state of a semigroup target is made of outputs.
        assert relative_error(seen["low"][0], seen["exact"][0]) < 1e-6

    def test_states_of_a_teacher_in_bfloat16_are_those_of_its_embedding(self, tmp_path, flm):
        teacher = build_flm(vocab_size=200).to(torch.bfloat16)
        trainer = build_trainer(tmp_path, FMLMModel.from_flm(build_flm(vocab_size=200)), teacher=teacher)
        input_ids, known = torch.randint(200, (64, 12)), torch.rand(64, 12) < 0.2
        noise, tau = torch.randn(64, 12, 64), torch.linspace(0, 1, 64)
        batch = build_batch(input_ids, noise, tau, torch.ones(64), known=known)
        student, state = states(trainer, batch)
        assert student.dtype == state.dtype == torch.float32
        embedding = teacher.embed_tokens.weight.detach().float()
        factor = JointNoise(trainer.model.embed_tokens.weight.detach(), embedding, frozen=[1]).factor(1).double()
        t, clean = teacher.time_map.tau_to_t(tau).double()[:, None, None], embedding.double()[input_ids]
        expected = torch.where(known[..., None], clean, (1 - t) * (noise.double() @ factor) + t * clean)
        for row, expected_row in zip(state, expected):
            assert relative_error(row, expected_row) < 1e-6

    @pytest.mark.parametrize("preset", ["single_stage", pytest.param("any_order", marks=pytest.mark.slow)])
    def test_resumes_and_evaluates_as_the_flm_does(self, preset, tmp_path):
        straight = distillation(tmp_path / "straight", preset, dropout=0.1, target_network="ema")
        straight.train()
        resumed = distillation(tmp_path / "straight", preset, dropout=0.1, target_network="ema")
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-10"))
        for name in ("loss", "eval_loss", "eval_loss_diagonal"):
            assert logged(resumed, name) == logged(straight, name) != []
        assert straight.evaluate()["eval_loss"] == straight.evaluate()["eval_loss"]
        weights = resumed.ema.averaged.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in straight.ema.averaged.state_dict().items())

    def test_accumulation_and_large_batches_agree(self, tmp_path):
        options = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
        small = distillation(tmp_path, gradient_accumulation_steps=2, **options)
        large = distillation(tmp_path, per_device_train_batch_size=16, **options)
        small.train(), large.train()
        for name in ("loss", "loss_diagonal", "loss_off_diagonal"):
            assert logged(small, name) == pytest.approx(logged(large, name), rel=1e-4)

    @pytest.mark.parametrize("preset", ["single_stage", pytest.param("any_order", marks=pytest.mark.slow)])
    def test_two_processes_learn_what_one_does(self, preset, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "prompt_fraction": 0.7, "distill": True}
        options["preset"] = preset
        (one,) = launch(tmp_path / "one", 1, per_device_train_batch_size=16, **options)
        two = launch(tmp_path / "two", 2, per_device_train_batch_size=8, **options)
        for name in ("loss", "loss_diagonal", "loss_off_diagonal", "grad_norm", "eval_loss", "eval_loss_off_diagonal"):
            assert logged(two[0]["log"], name) == pytest.approx(logged(one["log"], name), rel=1e-3)

    @pytest.mark.parametrize(
        "preset",
        ["any_order", *(pytest.param(each, marks=pytest.mark.slow) for each in ("single_stage", "two_network"))],
    )
    def test_sharded_weights_learn_what_whole_ones_do(self, preset, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_steps": 4, "ema_decay": 0.9, "preset": preset}
        options["prompt_fraction"] = 0.5
        whole = distillation(tmp_path / "one", per_device_train_batch_size=16, **options)
        whole.train()
        whole.save_model()
        log = launch(tmp_path / "two", 2, fsdp=True, distill=True, **options)[0]["log"]
        for name in ("loss", "loss_off_diagonal", "grad_norm", "eval_loss", "eval_loss_off_diagonal"):
            assert logged(log, name) == pytest.approx(logged(whole, name), rel=1e-3)
        first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)

    def test_student_and_teacher_see_the_same_noise(self, tmp_path, flm):
        # At initialization their embeddings coincide, and so must their states.
        trainer = build_trainer(
            tmp_path, FMLMModel.from_flm(build_flm(vocab_size=200)), teacher=build_flm(vocab_size=200)
        )
        trainer.teacher.load_state_dict(trainer.model.state_dict(), strict=False)
        noise = torch.randn(3, 12, 64)
        batch = build_batch(torch.randint(200, (3, 12)), noise, torch.rand(3) * 0.5, torch.ones(3))
        student, teacher = states(trainer, batch)
        torch.testing.assert_close(student, teacher, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"target": "semigrop"}, "`target` must be one of semigroup"),
            ({"divergence": "l2"}, "`divergence` must be one of"),
            ({"diagonal_fraction": 1.5}, "`diagonal_fraction` must be in"),
            ({"boundary_probability": -0.1}, "`boundary_probability` must be in"),
            ({"target": "eulerian"}, "needs `divergence='squared_error'`"),
            ({"target": "eulerian", "divergence": "squared_error"}, "needs `boundary_probability=0`"),
            ({"target_network": "ema", "ema_decay": None}, "set `ema_decay`"),
        ],
    )
    def test_bad_arguments(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            FMLMTrainingArguments(tmp_path, **options)

    def test_bad_combinations(self, flm, tmp_path):
        student = FMLMModel.from_flm(flm)
        with pytest.raises(ValueError, match="`preset` must be one of two_network"):
            FMLMTrainingArguments.from_preset("v3", output_dir=tmp_path)
        with pytest.raises(TypeError, match="`model` must be a flow map"):
            build_trainer(tmp_path, flm)
        with pytest.raises(TypeError, match="`args` must be `FMLMTrainingArguments`"):
            FMLMTrainer(student, FLMTrainingArguments(tmp_path))
        with pytest.raises(ValueError, match="`teacher` is frozen"):
            build_trainer(tmp_path, student, teacher=student)
        with pytest.raises(
            TypeError, match="`model` must be a `FLMModel` for `FLMTrainer`, got `FMLMTwoNetworkModel`"
        ):
            FLMTrainer(FMLMTwoNetworkModel.from_flm(flm), FLMTrainingArguments(tmp_path))
        with pytest.raises(ValueError, match="`teacher` has 20 tokens, but the model has 53"):
            build_trainer(tmp_path, student, teacher=build_flm(vocab_size=20))
        with pytest.raises(ValueError, match="`target='teacher'` needs a `teacher` that is itself a flow map"):
            build_trainer(tmp_path, student, teacher=flm, target="teacher")
        with pytest.raises(ValueError, match="needs `divergence='squared_error'`"):
            build_trainer(tmp_path, FMLMTwoNetworkModel.from_flm(flm), diagonal_fraction=0.0)
        with pytest.raises(ValueError, match="needs `diagonal_fraction=0`"):
            build_trainer(tmp_path, FMLMTwoNetworkModel.from_flm(flm), divergence="squared_error")
        fast = build_flm(attn_logit_softcapping=None)
        with pytest.raises(ValueError, match="load the model with `attn_implementation='eager'`"):
            build_trainer(tmp_path, FMLMModel.from_flm(fast), teacher=fast, target="lagrangian")


class TestCorrelations:
    """Two equally likely texts: marginals that are sampled independently would mix them half of the time."""

    @pytest.mark.slow
    def test_one_step_gives_whole_texts(self, tmp_path):
        new_york, san_diego = [0, 1], [2, 3]
        dataset = Dataset.from_dict({"input_ids": [new_york, san_diego] * 500})
        options = {
            "per_device_train_batch_size": 64, "learning_rate": 3e-3, "ema_decay": 0.98, "save_strategy": "no",
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 500, "lr_scheduler_type": "linear",
        }  # fmt: skip
        sizes = {"vocab_size": 4, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        config = build_flm(**sizes, max_position_embeddings=2, dropout=0.0, attn_logit_softcapping=None).config
        flm_trainer = FLMTrainer(FLMModel(config), FLMTrainingArguments(tmp_path, max_steps=400, **options), train_dataset=dataset)  # fmt: skip
        flm_trainer.train()
        flm_trainer.save_model()
        teacher = FLMModel.from_pretrained(tmp_path)
        args = FMLMTrainingArguments(tmp_path, max_steps=800, boundary_probability=0.25, **options)
        trainer = FMLMTrainer(FMLMModel.from_flm(teacher), args, teacher=teacher, train_dataset=dataset)
        trainer.train()
        trainer.save_model(tmp_path / "student")
        student = FMLMModel.from_pretrained(tmp_path / "student")

        def shares(model, num_steps):
            generator = torch.Generator().manual_seed(0)
            tokens = model.generate(num_samples=2000, num_steps=num_steps, batch_size=2000, generator=generator)
            return [(tokens == torch.tensor(text)).all(1).double().mean().item() for text in (new_york, san_diego)]

        first, second = shares(student, 1)
        assert first + second > 0.9
        assert 0.4 < first < 0.6
        assert sum(shares(teacher, 32)) > 0.9

        # The trained flow map composes: one jump arrives where two do.
        state = torch.randn(500, 2, 4) @ student.state_embedding
        zero, half, one = torch.zeros(500), torch.full((500,), 0.5), torch.ones(500)
        u = student.time_map.tau_to_t(half)
        with torch.no_grad():
            direct = student.posterior(state, zero, one).argmax()
            arrived = flow_map(state, student.posterior(state, zero, half).mean(student.state_embedding), zero, u)
            second_leg = student.posterior(arrived, half, one).argmax()
        assert (direct == second_leg).double().mean() > 0.95


def test_flow_of_a_low_precision_state_keeps_its_times():
    noise, clean = torch.randn(2, 64, 5, 3).to(torch.bfloat16)
    s = torch.linspace(0, 0.999, 64)
    t = 1 - (1 - s) * 0.9
    for function, times in ((interpolate, (t,)), (flow_map, (s, t))):
        value = function(noise, clean, *times)
        expected = function(noise.double(), clean.double(), *(time.double() for time in times))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
        # The state says what comes out, not the times.
        assert function(noise.float(), clean.float(), *(time.double() for time in times)).dtype == torch.float32
        assert function(noise.double(), clean.double(), *times).dtype == torch.float64


def test_divergences():
    target, logits = torch.randn(5, 7).softmax(-1), torch.randn(5, 7, requires_grad=True)
    log_delta = logits.log_softmax(-1)
    one_hot = F.one_hot(torch.arange(5), 7).float()
    for kind, expected in (
        ("kl", F.kl_div(log_delta, target, reduction="none").sum(-1)),
        ("cross_entropy", F.cross_entropy(logits, target, reduction="none")),
        ("squared_error", F.mse_loss(log_delta.exp(), target, reduction="none").sum(-1)),
    ):
        losses, gradients = softmax_divergence(kind, logits.detach().clone(), target)
        torch.testing.assert_close(losses, expected.detach())
        expected = torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(gradients, expected)
        losses, gradients = softmax_divergence(kind, logits.detach().clone(), one_hot)
        assert torch.isfinite(losses).all() and torch.isfinite(gradients).all()
