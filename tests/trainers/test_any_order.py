"""Training of flow maps in any order (FMLM+): time as it is, masked models to start and to learn from, and what is refused."""

import pytest
import torch
from datasets import Dataset
from distilling import build_batch, build_trainer, compute_targets, states
from exact_flows import ExactFlow, ExactFlowMap
from huggingface_hub.errors import StrictDataclassError
from small_models import build_flm, build_model
from tensors import relative_error, seed

from modeling_flm import FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkModel, IdentityTime
from modeling_flm.flow import interpolate
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, FMLMTrainingArguments


class TestTimes:
    def test_a_model_without_reparameterization(self, tmp_path):
        model = build_flm(time_reparameterization=None)
        tau, noise, input_ids = torch.rand(3), torch.randn(3, 12, 32), torch.randint(53, (3, 12))
        model.save_pretrained(tmp_path)
        loaded = FLMModel.from_pretrained(tmp_path)
        assert isinstance(loaded.time_map, IdentityTime)
        clean = model.make_state(input_ids)
        state = loaded.make_state(input_ids, tau, noise)
        zero = loaded.make_state(input_ids, torch.zeros(3), noise)
        torch.testing.assert_close(state, interpolate(zero, clean, tau))
        assert torch.equal(loaded.time_map.dtau_dt(tau), torch.ones(3))
        with pytest.raises(StrictDataclassError, match="`time_reparameterization` must be 'argmax', or `None`"):
            build_flm(time_reparameterization="linear")

    @pytest.mark.parametrize("target", ["semigroup", "lagrangian", "eulerian"])
    def test_exact_targets_with_a_teacher_that_counts_time_differently(self, target, tmp_path):
        """The student has no reparameterization, and the teacher the published one: the fixed point is the same."""
        student, teacher = ExactFlowMap(), ExactFlowMap()
        student.time_map = IdentityTime()
        options = {"target": target, "divergence": "squared_error", "boundary_probability": 0.0}
        trainer = build_trainer(tmp_path, student, teacher=teacher, **options)
        s = torch.tensor([0.02, 0.1, 0.3, 0.5], dtype=torch.float64)
        t = torch.tensor([0.3, 0.8, 0.5, 0.9], dtype=torch.float64)
        noise = torch.randn(4, 2, 2, dtype=torch.float64, generator=seed())
        batch = build_batch(torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]]), noise, s, t)
        own, seen = states(trainer, batch)
        assert torch.equal(own, seen)
        delta = student.posterior(own, s, t).dense()
        torch.testing.assert_close(compute_targets(trainer, batch)[0], delta, rtol=0, atol=3e-5)

    def test_student_and_teacher_are_noised_equally_where_tau_rounds_to_one(self, tmp_path):
        student = FMLMModel.from_flm(build_flm(), time_reparameterization=None)
        trainer = build_trainer(tmp_path, student, teacher=build_flm())
        trainer.teacher.load_state_dict(student.state_dict(), strict=False)
        t = torch.tensor([0.9, 0.95, 0.99])
        batch = build_batch(torch.randint(53, (3, 12)), torch.randn(3, 12, 53), t, torch.ones(3))
        own, seen = states(trainer, batch)
        assert relative_error(own, seen) < 1e-6
        assert relative_error(own, student.make_state(batch.input_ids)) > 1e-3

    def test_guidance_by_a_model_that_counts_time_differently(self):
        texts, weights = [(0, 0), (0, 1), (1, 1)], (0.5, 0.2, 0.3)
        model, guide = ExactFlow(texts, weights), ExactFlow(texts, weights)
        guide.time_map = IdentityTime()
        options = {"num_samples": 200, "num_steps": 8, "generator": seed()}
        plain = model.generate(**options)
        options["generator"] = seed()
        assert torch.equal(model.generate(guidance_model=guide, guidance_scale=3.0, **options), plain)


class TestMasked:
    """Masked diffusion models as what a flow map starts from, and learns from."""

    def masked_model(self, **options) -> FLMModel:
        model = build_flm(vocab_size=54, **options)
        return model

    def test_from_masked_says_at_first_what_the_masked_model_says(self):
        masked = self.masked_model()
        model = FMLMModel.from_masked(masked, dropout=0.0).eval()
        assert model.config.vocab_size == 53 and model.config.per_token_timesteps
        assert torch.equal(model.embed_tokens.weight, masked.embed_tokens.weight[:53])
        state, times = torch.randn(3, 12, 32), torch.rand(2, 3, 12).sort(dim=0).values
        logits = model(inputs_embeds=state, timesteps=times[0], target_timesteps=times[1]).logits
        expected = masked(inputs_embeds=state, timesteps=torch.zeros(3)).logits[..., :53]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="`vocab_size` must be 53"):
            FMLMModel.from_masked(masked, vocab_size=54)
        for sizes in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 16}):
            with pytest.raises(ValueError, match="`config_overrides` must leave all sizes as they are"):
                FMLMModel.from_masked(masked, **sizes)
        with pytest.raises(TypeError, match="`masked_model` must be an `FLMModel`, got `FMLMModel`"):
            FMLMModel.from_masked(model)
        masked.config.pad_token_id = 53
        assert FMLMModel.from_masked(masked).config.pad_token_id is None

    def test_what_the_mask_says_of_itself_does_not_matter(self, tmp_path):
        masked = self.masked_model(final_logit_softcapping=None)
        trainer = build_trainer_with_mask(tmp_path, build_model("fmlm"), masked)
        zero = torch.zeros(3)
        batch = build_batch(torch.randint(53, (3, 12)), torch.randn(3, 12, 32), zero, zero, masked=[0, 1, 2])
        expected = compute_targets(trainer, batch)[0]
        masked.lm_head.bias.data[53] = 200.0  # which its training does not look at
        torch.testing.assert_close(compute_targets(trainer, batch)[0], expected)
        torch.testing.assert_close(expected.sum(-1), torch.ones(3, 12))

    def test_masked_teacher_is_the_denoiser_of_noise(self, tmp_path):
        """At the time 0 the exact denoiser knows of a text what is known, as the exact masked model does."""
        texts, weights = [(0, 0, 0), (0, 1, 1), (1, 1, 0), (1, 0, 1)], (0.4, 0.3, 0.2, 0.1)

        class ExactMasked(ExactFlow):
            """With a mask after the two tokens, of which it says as much."""

            config_class = FMLMConfig

            def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None):
                is_mask = state[..., 2:3] == 1
                x, times = state[..., :2].masked_fill(is_mask, 0.0), torch.where(is_mask[..., 0], 0.0, 1.0)
                exact = ExactFlow(texts, weights)
                delta = 0.75 * exact.denoiser(x, times)
                return torch.cat([delta, torch.full_like(delta[..., :1], 0.25)], dim=-1).to(state.dtype)

            def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
                scores = hidden_states.log().flatten(0, 1)
                return logits_processor(scores[:, :0], scores).softmax(-1).view_as(hidden_states)

        ExactMasked.__name__ = "FLMModel"  # which it stands in for
        masked = ExactMasked([(0, 0, 0), (0, 3, 1)], (0.5, 0.5))
        student, exact = ExactFlow(texts, weights), ExactFlow(texts, weights)
        masked.config.model_type, masked.config.vocab_size = "flm", 3
        masked.embed_tokens.weight.data = torch.eye(3)
        trainer = build_trainer_with_mask(tmp_path, student, masked)
        input_ids = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 1]])
        known = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
        zero = torch.zeros(3)
        noise = torch.randn(3, 3, 2)
        batch = build_batch(input_ids, noise, zero, zero, known=known, masked=[0, 1, 2])
        target = compute_targets(trainer, batch)[0]
        expected = exact.denoiser(states(trainer, batch)[0], batch.tau_s).float()
        torch.testing.assert_close(target[~known], expected[~known], rtol=1e-5, atol=1e-5)

    def test_share_of_examples(self, tmp_path):
        trainer = build_trainer_with_mask(tmp_path, build_model("fmlm"), self.masked_model(), masked_probability=0.25)
        times = trainer.time_sampler(torch.rand(4000, 5, generator=seed()), range(4000))
        rows = times.groups["masked"]
        assert abs(len(rows) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
        assert all(tau[rows].eq(0).all() for tau in (times.tau_s, times.tau_t, times.tau_u))
        assert sorted(row for rows in times.groups.values() for row in rows) == list(range(4000))

    def test_is_loaded_by_name_and_refused_for_two_networks(self, tmp_path):
        self.masked_model().save_pretrained(tmp_path / "masked")
        trainer = build_trainer_with_mask(tmp_path, build_model("fmlm"), str(tmp_path / "masked"))
        assert type(trainer.masked_teacher) is FLMModel
        two = FMLMTwoNetworkModel.from_flm(build_flm())
        options = {"divergence": "squared_error", "diagonal_fraction": 0.0}
        with pytest.raises(ValueError, match="`masked_teacher` is for an `FMLMModel`"):
            build_trainer_with_mask(tmp_path, two, self.masked_model(), **options)

    def test_trains_and_logs_its_loss(self, tmp_path):
        rows = torch.randint(53, (64, 12), generator=seed()).tolist()
        trainer = build_trainer_with_mask(
            tmp_path, build_model("fmlm", per_token_timesteps=True), self.masked_model(), masked_probability=0.5,
            prompt_fraction=1.0, prompt_kinds=["independent"], max_steps=3, logging_steps=1, save_strategy="no",
            dataset=Dataset.from_dict({"input_ids": rows}),
        )  # fmt: skip
        trainer.train()
        losses = [row["loss_masked"] for row in trainer.state.log_history if "loss_masked" in row]
        assert losses and all(0 < loss < 10 for loss in losses)

    def test_bad_teachers_are_named(self, tmp_path):
        model = build_model("fmlm")
        for masked, probability, message in (
            (None, 0.5, "`masked_teacher` and `masked_probability` go together"),
            (self.masked_model(), 0.0, "`masked_teacher` and `masked_probability` go together"),
            (build_flm(), 0.5, "`masked_teacher` must be an `FLMModel` with 54 tokens"),
            (build_model("fmlm", vocab_size=54), 0.5, "got `FMLMModel` with 54"),
        ):
            with pytest.raises(ValueError, match=message):
                build_trainer_with_mask(tmp_path, model, masked, masked_probability=probability)


def build_trainer_with_mask(path, model, masked_teacher, dataset=None, **options) -> FMLMTrainer:
    options.setdefault("masked_probability", 0.5)
    args = FMLMTrainingArguments(path, use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return FMLMTrainer(model, args, masked_teacher=masked_teacher, train_dataset=dataset)


class TestWrongModels:
    def test_flow_maps_are_refused_where_an_flm_is_meant(self, tmp_path):
        flm = build_flm()
        flow_map = FMLMModel.from_flm(flm)
        with pytest.raises(TypeError, match="`model` is a flow map, `FMLMModel`: train it with `FMLMTrainer`"):
            FLMTrainer(flow_map, FLMTrainingArguments(tmp_path))
        with pytest.raises(
            TypeError, match="`teacher` must be an `FLMModel`, got `FMLMModel`. A flow map is a student"
        ):
            FMLMModel.from_flm(flow_map)
        two = FMLMTwoNetworkModel.from_flm(flm)
        for model_class in (FMLMModel, FMLMTwoNetworkModel):
            with pytest.raises(TypeError, match="Pass its flow, `teacher.flow`"):
                model_class.from_flm(two)
        with pytest.raises(
            ValueError, match="`divergence` must be one of cross_entropy, kl, squared_error, got 'mse'"
        ):
            tau, hidden_states = torch.zeros(1), torch.randn(1, 12, 32)
            flm.divergence_loss("mse", flm.posterior(hidden_states, tau), torch.ones(1, 12), hidden_states, tau)
