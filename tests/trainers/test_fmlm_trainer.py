"""Training of flow maps: times, presets, targets, precision, several processes and errors."""

import math

import pytest
import torch
from datasets import Dataset
from distilling import build_batch, build_trainer, states
from small_models import build_flm
from tensors import relative_error
from train_tiny import distillation, launch, logged
from transformers import AutoModel

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.flow import flow_map
from modeling_flm.joint_noise import JointNoise
from modeling_flm.trainers import (
    PRESETS,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    fmlm_trainer,
    objectives,
)
from modeling_flm.trainers.batches import FlowTimes, stratified_uniforms


class TestTimes:
    def draw(self, tmp_path, flm, num=4000, **options) -> FlowTimes:
        trainer = build_trainer(tmp_path, FMLMModel.from_flm(flm), teacher=flm, **options)
        return trainer.time_sampler(stratified_uniforms(num, 4, 0), range(num))

    def test_groups(self, tmp_path, flm):
        times = self.draw(tmp_path, flm, diagonal_fraction=0.25, boundary_probability=0.1)
        rows = times.groups
        assert len(rows["diagonal"]) == 1000 and rows["diagonal"][:3] == [3, 7, 11]
        assert abs(len(rows["boundary"]) - 300) < 5 * math.sqrt(300)
        assert sorted(sum(rows.values(), [])) == list(range(4000))
        s, u, t = times.tau_s, times.tau_u, times.tau_t
        assert torch.equal(s[rows["diagonal"]], t[rows["diagonal"]])
        assert (s[rows["boundary"]] == 0).all() and (t[rows["boundary"]] == 1).all()
        off = rows["off_diagonal"]
        assert (t[off] - s[off] > 9e-4).all() and (s >= 0).all() and (t <= 1).all()
        torch.testing.assert_close(u, (s + t) / 2)

    def test_distributions(self, tmp_path, flm):
        options = {"diagonal_fraction": 0.0, "boundary_probability": 0.0}
        times = self.draw(tmp_path, flm, **options)
        s, t = times.tau_s.double(), times.tau_t.double()
        # d ~ U(0, 1), s ~ U(0, 1 - d): means 1/2 and 1/4
        assert abs((t - s).mean() - 0.5) < 0.01 and abs(s.mean() - 0.25) < 0.01
        times = self.draw(tmp_path, flm, time_sampling="uniform_pair", intermediate_time="random", **options)
        s, u, t = times.tau_s.double(), times.tau_u.double(), times.tau_t.double()
        assert abs(s.mean() - 1 / 3) < 0.01 and abs(t.mean() - 2 / 3) < 0.01
        fraction = (u - s) / (t - s)
        assert abs(fraction.mean() - 0.5) < 0.01 and abs(fraction.var() - 1 / 12) < 0.01


class TestTraining:
    @pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "distribution_matching"])
    def test_presets_train(self, preset, tmp_path):
        trainer = distillation(tmp_path, preset, max_steps=50, eval_steps=25, save_strategy="no")
        before = trainer.evaluate()["eval_loss"]
        frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        no_diagonal = preset in ("two_network", "second_stage")
        expected = {"loss_off_diagonal"} if no_diagonal else {"loss_diagonal", "loss_off_diagonal"}
        for prefix in ("", "eval_"):
            assert all(logged(trainer, prefix + name) for name in expected)
        assert bool(logged(trainer, "loss_diagonal")) == (not no_diagonal)
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
        # V exceeds the joint width, so the noise has another size with the average among the networks.
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

            def spy(network, state, *args, name=name, posterior_of=objectives.posterior_of, **options):
                value = posterior_of(network, state, *args, **options)
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
    def test_teacher_in_bfloat16_reads_float32_states(self, options, tmp_path):
        seen, options = {}, {"max_steps": 20, "eval_steps": 20, "save_strategy": "no", **options}
        for name, dtype in (("low", torch.bfloat16), ("exact", torch.float32)):
            trainer = distillation(tmp_path, frozen_dtype=dtype, **options)
            network = trainer.model.flow if trainer.teacher is None else trainer.teacher
            if name == "exact":
                network.to(torch.bfloat16).float()  # the same weights, computed in float32
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
        # Only the first state: at the first batch the students are equal, and later states are made of outputs.
        assert relative_error(seen["low"][0], seen["exact"][0]) < 1e-6

    def test_states_of_a_teacher_in_bfloat16_follow_its_embedding(self, tmp_path, flm):
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
    def test_resume_from_checkpoint_equals_uninterrupted_distillation(self, preset, tmp_path):
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
    def test_two_processes_distill_like_one(self, preset, tmp_path):
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
    def test_sharded_weights_distill_like_whole_ones(self, preset, tmp_path):
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

    def test_student_and_teacher_read_the_same_noise(self, tmp_path, flm):
        # Equal embeddings must give equal states.
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
        with pytest.raises(ValueError, match="`target='teacher'` needs a `teacher` that is itself a flow map"):
            FMLMTrainer(student, FMLMTrainingArguments.from_preset("second_stage", output_dir=tmp_path))
        for args in (
            FMLMTrainingArguments.from_preset("single_stage", output_dir=tmp_path),
            FMLMTrainingArguments(tmp_path, target="lagrangian"),
        ):
            with pytest.raises(ValueError, match=r"`teacher` is missing.*from_preset\('self_distillation'"):
                FMLMTrainer(student, args)
        for preset in ("self_distillation", "any_order"):
            FMLMTrainer(student, FMLMTrainingArguments.from_preset(preset, output_dir=tmp_path))
        fast = build_flm(attn_logit_softcapping=None)
        with pytest.raises(ValueError, match="load the model with `attn_implementation='eager'`"):
            build_trainer(tmp_path, FMLMModel.from_flm(fast), teacher=fast, target="lagrangian")


class TestCorrelations:
    """Two equally likely texts. Independent samples of the marginals would mix them half of the time."""

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

        # The trained flow map composes: one step arrives where two steps do.
        state = torch.randn(500, 2, 4) @ student.state_embedding
        zero, half, one = torch.zeros(500), torch.full((500,), 0.5), torch.ones(500)
        u = student.time_map.tau_to_t(half)
        with torch.no_grad():
            direct = student.posterior(state, zero, one).argmax()
            arrived = flow_map(state, student.posterior(state, zero, half).mean(student.state_embedding), zero, u)
            second_leg = student.posterior(arrived, half, one).argmax()
        assert (direct == second_leg).double().mean() > 0.95
