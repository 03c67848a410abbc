"""Targets of distillation: published values, exact flow maps as fixed points, and the projection to the simplex."""

import math

import oracle
import pytest
import torch
from distilling import build_batch, build_trainer, compute_loss, compute_targets, states
from exact_flows import ExactFlowMap
from tensors import relative_error

from modeling_flm.trainers import FMLMTrainer, objectives


def divergence(kind, target, delta):
    """Computes the divergence of a target and a two-time denoiser, both dense."""
    if kind == "squared_error":
        return (target - delta).square().sum(-1)
    entropy = torch.xlogy(target, target).sum(-1) if kind == "kl" else 0.0
    return entropy - (target * delta.log()).sum(-1)


class TestPublishedValues:
    values = oracle.values()

    def trainer(self, tmp_path, path, model, teacher=None, **options) -> FMLMTrainer:
        trainer = build_trainer(tmp_path, model, teacher, **options)
        if path == "compiled":
            for network in {trainer.model, trainer.teacher} - {None}:
                network.compile_regions(backend="aot_eager")
        return trainer

    def batch(self, tau_s, tau_t, tau_u=None, **groups):
        # V is below the joint width of two networks, so the noise is one-hot noise.
        return build_batch(self.values["input_ids"], self.values["noise"], tau_s, tau_t, tau_u, **groups)

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
        assert relative_error(model.correction.head_outputs(hidden_states), values["stage1.correction"]) < 1e-4
        target, weight = compute_targets(trainer, batch)
        assert torch.equal(weight, torch.ones(3))
        losses = divergence("squared_error", target, output.probabilities)
        losses = torch.exp(-log_weight)[:, None] * losses + log_weight[:, None]
        assert relative_error(losses, values["stage1.loss_per_token"]) < 3e-3
        # The evaluation loss does not use the learned weight.
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
    def test_exact_flow_map_is_a_fixed_point(self, target, with_teacher, tmp_path):
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
        # The semigroup target is exact. Derivatives use the table of the time map, which is exact to 1e-5.
        torch.testing.assert_close(value, delta, rtol=0, atol=1e-8 if target == "semigroup" else 2e-5)
        # The map is not constant.
        denoised = model.posterior(state, self.tau_s, self.tau_s).dense()
        assert (delta - denoised).abs().max() > 1e-2

    @pytest.mark.parametrize("target", ["semigroup", "lagrangian", "eulerian"])
    def test_exact_flow_map_is_a_fixed_point_with_known_tokens(self, target, tmp_path):
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


def test_project_to_simplex_keeps_nan():
    assert objectives.project_to_simplex(torch.tensor([[float("nan"), 0.0, 1.0]])).isnan().any()


def test_project_to_simplex_is_the_nearest_point():
    x = torch.randn(50, 7, dtype=torch.float64) * 2
    projected = objectives.project_to_simplex(x)
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(50, dtype=torch.float64))
    # Optimality: (x - p) · (q - p) <= 0 for every vertex q of the simplex.
    gaps = torch.einsum("nv,nqv->nq", x - projected, torch.eye(7, dtype=torch.float64) - projected[:, None])
    assert gaps.max() < 1e-12
    torch.testing.assert_close(objectives.project_to_simplex(projected), projected, rtol=0, atol=1e-12)
