"""The trainer: times and noise, the loss, evaluation, averaged weights, checkpoints, several processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from oracle import SCORER
from processes import run_processes
from safetensors.torch import load_file
from small_models import build_flm
from tensors import noise_factors
from train_tiny import RecordingTrainer, build, distillation, launch, logged
from transformers import AutoModel, EarlyStoppingCallback, TrainerCallback

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.flow import interpolate
from trainers import (
    EMACallback,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainingArguments,
    generate_samples,
    load_gen_ppl,
    train_tokenizer,
)
from trainers.batches import draw_known_masks, draw_noise, example_seed, low_discrepancy_uniforms, stratified_uniforms


class TestNoise:
    def test_one_time_in_each_stratum(self):
        points = stratified_uniforms(1000, 3, 3, 0, 7)
        for times in points.T:
            assert torch.equal((times.sort().values * 1000).floor().long(), torch.arange(1000))
            assert not torch.equal(times, times.sort().values)
        assert torch.corrcoef(points.T).triu(1).abs().max() < 5 / 1000**0.5
        assert torch.equal(points, stratified_uniforms(1000, 3, 3, 0, 7))
        assert not torch.equal(points, stratified_uniforms(1000, 3, 3, 0, 8))

    def test_times_are_uniform_within_their_stratum(self):
        times = torch.stack([stratified_uniforms(4, 1, 0, step)[:, 0] for step in range(5000)])
        inside = (times * 4) % 1
        assert abs(inside.mean() - 0.5) < 5 * (1 / 12 / inside.numel()) ** 0.5
        assert abs(times[:, 0].mean() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5  # so is each position over all strata

    def test_evaluation_times_spread_evenly_over_any_part(self):
        times = low_discrepancy_uniforms(0, 1000, 1)[:, 0]
        assert torch.equal(low_discrepancy_uniforms(400, 100, 1)[:, 0], times[400:500])
        for part in (times[:50], times[313:363], times):
            gaps = part.sort().values.diff()
            assert gaps.max() < 3 / len(part)

    def test_evaluation_points_fill_the_square(self):
        points = low_discrepancy_uniforms(0, 400, 2)
        cells = (points * 10).floor().long()
        counts = torch.bincount(cells[:, 0] * 10 + cells[:, 1], minlength=100)
        assert counts.min() >= 2 and counts.max() <= 6  # 4 on average

    def test_noise_of_an_example_depends_on_its_seed_alone(self):
        seeds = [example_seed(0, 1, position) for position in range(6)]
        assert len(set(seeds)) == 6
        noise = draw_noise(seeds, 5, 3, device=torch.device("cpu"))
        assert torch.equal(noise[2:4], draw_noise(seeds[2:4], 5, 3, device=torch.device("cpu")))
        noise = draw_noise([example_seed(9, n) for n in range(2000)], 10, device=torch.device("cpu")).flatten()
        assert abs(noise.mean()) < 5 / len(noise) ** 0.5
        assert abs(noise.var() - 1) < 5 * (2 / len(noise)) ** 0.5


class TestPrompts:
    def test_are_beginnings_surroundings_and_random_tokens(self):
        seeds = [example_seed(0, n) for n in range(6000)]
        lengths = 3 + torch.arange(6000) % 8
        real = torch.arange(10) < lengths[:, None]
        known = draw_known_masks(seeds, real, 10, 0.75)
        assert not (known & ~real).any()
        # Those of a few examples, and with more padding, are the same.
        assert torch.equal(draw_known_masks(seeds[5:9], real[5:9, :6], 10, 0.75), known[5:9, :6])
        assert not draw_known_masks(seeds, real, 10, 0.0).any()

        num_known, has_prompt = known.sum(dim=1), known.any(dim=1)
        assert abs(has_prompt.double().mean() - 0.75) < 4 * (0.75 * 0.25 / 6000) ** 0.5
        assert (num_known < lengths).all()
        assert not draw_known_masks(
            seeds, real & (torch.arange(10) < 1), 10, 1.0
        ).any()  # nothing would be left to learn

        full = known[has_prompt & (lengths == 10)].tolist()
        sizes = torch.tensor([sum(row) for row in full])
        assert (torch.bincount(sizes, minlength=10)[1:] > len(full) / 9 / 2).all()  # every number of tokens
        is_beginning = [row == sorted(row, reverse=True) for row in full]
        gaps = ["".join("01"[token] for token in row).strip("1") for row in full]
        is_surrounding = ["1" not in gap for gap in gaps]  # beginnings are, too
        # A third of each kind; one random choice in four happens to be of another.
        assert 0.3 < sum(is_beginning) / len(full) < 0.5
        assert 0.62 < sum(is_surrounding) / len(full) < 0.82

    def test_loss_is_that_of_the_rest_given_the_prompt(self, tmp_path):
        trainer = build(tmp_path, max_steps=3, gradient_accumulation_steps=2, save_strategy="no", prompt_fraction=0.8)
        model = trainer.model
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batches, add_noise = [], trainer._add_noise
        trainer._add_noise = lambda batch: batches.append(add_noise(batch)) or batches[-1]
        trainer.train()
        model.load_state_dict(initial)
        model.eval()
        total, count = 0.0, 0
        for batch in batches[:2]:
            clean = model.embed_tokens(batch.input_ids)
            (factor,) = noise_factors(model.embed_tokens.weight)
            known = batch.tau_s == 1
            tau = batch.tau_s.amin(dim=1)
            assert torch.equal(batch.tau_s, torch.where(known, 1.0, tau[:, None])) and (tau < 1).all()
            t = model.time_map.tau_to_t(tau)[:, None, None]
            state = torch.where(known[..., None], clean, (1 - t) * (batch.noise @ factor) + t * clean)
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            logits = model(inputs_embeds=state, timesteps=batch.tau_s, attention_mask=mask).logits
            losses = F.cross_entropy(logits.transpose(1, 2), batch.input_ids, reduction="none")
            is_learned = (mask * ~known).bool()
            assert torch.equal(is_learned, batch.labels != -100) and known.any()
            total, count = total + losses[is_learned].sum().item(), count + is_learned.sum().item()
        assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-4)
        losses = []
        for batch_size in (4, 21):
            trainer.args.per_device_eval_batch_size = batch_size
            losses.append(trainer.evaluate()["eval_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_times_per_token_come_with_the_weights_of_a_model_without_them(self, tmp_path):
        flm = build_flm()
        flm.save_pretrained(tmp_path)
        model = FLMModel.from_pretrained(tmp_path, per_token_timesteps=True)
        input_ids, tau = torch.randint(53, (2, 12)), torch.rand(2)
        assert torch.equal(model(input_ids, tau).logits, flm(input_ids, tau).logits)
        student = FMLMModel.from_flm(flm, per_token_timesteps=True)
        student.save_pretrained(tmp_path)
        assert AutoModel.from_pretrained(tmp_path).config.per_token_timesteps
        with pytest.raises(ValueError, match="`prompt_fraction` must be in .0, 1., got 1.5"):
            FLMTrainingArguments(tmp_path, prompt_fraction=1.5)


class TestLoss:
    def test_is_the_cross_entropy_over_real_tokens_of_the_whole_step(self, tmp_path):
        trainer = build(
            tmp_path, max_steps=1, gradient_accumulation_steps=3, trainer_class=RecordingTrainer, save_strategy="no"
        )
        model = trainer.model
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.seen.clear()
        batches = []
        add_noise = trainer._add_noise
        trainer._add_noise = lambda batch: batches.append(add_noise(batch)) or batches[-1]
        trainer.train()
        reference = build_flm(**{name: getattr(model.config, name) for name in model.config.to_dict() if name in (
            "vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "conditioning_size",
            "max_position_embeddings")})  # fmt: skip
        reference.load_state_dict(state)
        total, count = 0.0, 0
        for batch in batches[:3]:
            (factor,) = noise_factors(reference.embed_tokens.weight)
            t = reference.time_map.tau_to_t(batch.tau_s)
            state = interpolate(batch.noise @ factor, reference.embed_tokens(batch.input_ids), t)
            mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
            logits = reference(inputs_embeds=state, timesteps=batch.tau_s, attention_mask=mask).logits
            losses = F.cross_entropy(logits.transpose(1, 2), batch.input_ids, reduction="none")
            total, count = total + (losses * mask).sum().item(), count + mask.sum().item()
        assert count < 3 * 8 * 10  # there was padding
        assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-4)

    def test_times_of_a_step_are_stratified_over_its_global_batch(self, tmp_path):
        trainer = build(tmp_path, max_steps=2, gradient_accumulation_steps=3, trainer_class=RecordingTrainer, save_strategy="no", eval_strategy="no")  # fmt: skip
        trainer.seen.clear()
        trainer.train()
        for step in (0, 1):
            times = sorted(row[2] for row in trainer.seen if row[0] == step)
            assert [int(time * 24) for time in times] == list(range(24))

    def test_accumulation_and_large_batches_agree(self, tmp_path):
        options = {"max_steps": 4, "save_strategy": "no"}
        small = build(tmp_path, gradient_accumulation_steps=2, **options)
        large = build(tmp_path, per_device_train_batch_size=16, **options)
        small.train(), large.train()
        np.testing.assert_allclose(logged(small, "loss"), logged(large, "loss"), rtol=1e-4)
        for first, second in zip(small.model.parameters(), large.model.parameters()):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)

    def test_labels_and_columns_of_the_dataset(self, tmp_path):
        # Labels are honored; other columns, also with names of `forward`'s arguments, are not passed on.
        trainer = build(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
        rows = trainer.train_dataset.to_dict()["input_ids"]
        dataset = trainer.train_dataset.add_column("labels", [[-100] * len(row) for row in rows])
        dataset = dataset.add_column("t", [0.5] * len(rows)).add_column("noise", [0.1] * len(rows))
        trainer.train_dataset = dataset
        trainer.train()
        assert logged(trainer, "loss")[0] == 0

    def test_batches_of_similar_lengths_have_little_padding(self, tmp_path):
        def share_of_padding(strategy):
            options = {"save_strategy": "no", "eval_strategy": "no", "train_sampling_strategy": strategy}
            trainer = build(tmp_path, max_steps=15, **options)
            batches, training_step = [], trainer.training_step
            trainer.training_step = lambda model, *args: batches.append(args[0]) or training_step(model, *args)
            trainer.train()
            masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
            return 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)

        assert share_of_padding("group_by_length") < share_of_padding("random") / 2


class StreamOfExamples(torch.utils.data.IterableDataset):
    """Examples that can be read once."""

    def __init__(self, examples):
        self.examples = iter(examples)

    def __iter__(self):
        return self.examples


class TestBosToken:
    options = {"max_steps": 5, "save_strategy": "no", "eval_strategy": "no", "trainer_class": RecordingTrainer}

    @staticmethod
    def answer(caplog) -> str:
        (record,) = [record for record in caplog.records if "training texts begin" in record.message]
        return f"{record.levelname}: {record.message}"

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("with_bos", [False, True])
    def test_bos_token_begins_prompts_as_it_begins_texts(self, with_bos, streaming, tmp_path, caplog):
        caplog.set_level("INFO", "trainers.flm_trainer")
        trainer = build(tmp_path, **self.options)
        bos = trainer.processing_class.bos_token_id
        rows = trainer.train_dataset.to_dict()["input_ids"]
        if with_bos:
            rows = [[bos, *row[1:]] if n % 2 == 0 else row for n, row in enumerate(rows)]
        dataset = Dataset.from_dict({"input_ids": rows, "noise": [0.5] * len(rows)})
        trainer.train_dataset = dataset.to_iterable_dataset() if streaming else dataset
        trainer.seen.clear()
        trainer.train()
        assert trainer.model.generation_config.bos_token_id == (bos if with_bos else None)
        if with_bos:
            assert "INFO: 16 of the first 32 training texts begin with the BOS token (1)" in self.answer(caplog)
        else:
            assert "WARNING: None of the first 32 training texts begins with the BOS token (1)" in self.answer(caplog)
        if streaming:  # the training has seen the dataset from its beginning
            seen = [[token for token in row[1] if token] for row in trainer.seen]
            assert seen == rows[: len(seen)] and len(seen) == 40

    def test_bos_token_stays_where_texts_can_be_read_only_once(self, tmp_path, caplog):
        trainer = build(tmp_path, **self.options)
        rows = trainer.train_dataset.to_list()
        trainer.train_dataset = StreamOfExamples(rows)
        trainer.seen.clear()
        trainer.train()
        assert [[token for token in row[1] if token] for row in trainer.seen] == [
            row["input_ids"] for row in rows[:40]
        ]
        assert trainer.model.generation_config.bos_token_id == trainer.processing_class.bos_token_id
        assert "WARNING: Whether training texts begin with the BOS token (1) is not known" in self.answer(caplog)

    def test_bos_token_is_left_alone_by_evaluation(self, tmp_path):
        trainer = build(tmp_path, **self.options)
        trainer.model.generation_config.bos_token_id = 7
        trainer.evaluate()
        assert trainer.model.generation_config.bos_token_id == 7

    def test_bos_token_is_decided_before_the_first_batch(self, tmp_path):
        trainer = build(tmp_path, **self.options)
        found, get_batch_samples = [], trainer.get_batch_samples
        trainer.get_batch_samples = lambda *args: (
            found.append(trainer.model.generation_config.bos_token_id) or get_batch_samples(*args)
        )
        trainer.train()
        assert set(found) == {None}

    def test_bos_token_is_the_same_on_all_processes(self, tmp_path):
        run_processes(train_with_bos_tokens_in_the_first_process, tmp_path)
        assert [(tmp_path / f"bos-{index}").read_text() for index in (0, 1)] == ["1", "1"]


def train_with_bos_tokens_in_the_first_process(output_dir: Path):
    """The training of one of several processes; texts of the first alone begin with the BOS token."""
    trainer = build(output_dir, max_steps=1, save_strategy="no", eval_strategy="no")
    index = trainer.args.process_index
    if index == 0:
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [1, *row["input_ids"][1:]]})
    trainer.train()
    Path(output_dir, f"bos-{index}").write_text(str(trainer.model.generation_config.bos_token_id))


class TestEvaluation:
    def test_is_deterministic_and_independent_of_the_batch_size(self, tmp_path):
        trainer = build(tmp_path, max_steps=5)
        trainer.train()
        first = trainer.evaluate()["eval_loss"]
        torch.manual_seed(123)
        assert trainer.evaluate()["eval_loss"] == first
        losses = []
        for batch_size in (1, 4, 21):
            trainer.args.per_device_eval_batch_size = batch_size
            losses.append(trainer.evaluate()["eval_loss"])
        np.testing.assert_allclose(losses, first, rtol=1e-5)

    def test_predict_returns_logits(self, tmp_path):
        trainer = build(tmp_path, max_steps=1)
        trainer.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape[-1]}
        assert trainer.evaluate()["eval_shape"] == 40


class TestAveragedWeights:
    def test_follow_the_published_warm_up(self, tmp_path):
        trajectory = []

        class Record(TrainerCallback):
            def on_train_begin(self, args, state, control, model=None, **kwargs):
                self.on_step_end(args, state, control, model)

            def on_step_end(self, args, state, control, model=None, **kwargs):
                trajectory.append(model.embed_tokens.weight.detach().double().clone())

        trainer = build(tmp_path, max_steps=15, ema_decay=0.5)
        trainer.add_callback(Record())
        trainer.train()
        average = trajectory[0]
        for step, weight in enumerate(trajectory[1:], start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(
            trainer.ema.averaged.module.embed_tokens.weight.double(), average, rtol=1e-5, atol=1e-7
        )
        assert trainer.ema.num_updates == 15

    def test_are_what_is_evaluated_and_saved(self, tmp_path):
        trainer = build(tmp_path, ema_decay=0.9)
        trainer.train()
        average = trainer.ema.averaged.module
        raw = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.save_model()
        loaded = AutoModel.from_pretrained(tmp_path)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, average.state_dict()[name])
            assert torch.equal(raw[name], trainer.model.state_dict()[name]), "the training's weights changed"
        assert not torch.equal(loaded.embed_tokens.weight, trainer.model.embed_tokens.weight)
        # A model with these weights and no average evaluates to the same.
        plain = build(tmp_path / "plain", ema_decay=None)
        plain.model.load_state_dict(loaded.state_dict())
        assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        checkpoint = load_file(tmp_path / "checkpoint-20" / "training_weights.safetensors")
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in raw.items())

    def test_survive_an_interrupted_evaluation(self, tmp_path):
        trainer = build(tmp_path, max_steps=3, save_strategy="no", eval_strategy="no")
        trainer.train()
        raw = trainer.model.embed_tokens.weight.clone()
        trainer.prediction_step = lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate()
        assert torch.equal(trainer.model.embed_tokens.weight, raw)

    def test_best_model_is_the_averaged_one_of_its_checkpoint(self, tmp_path):
        trainer = build(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.5)
        trainer.train()
        best = trainer.state.best_model_checkpoint
        trainer.save_model(tmp_path / "best")
        saved = load_file(tmp_path / "best" / "model.safetensors")
        expected = load_file(f"{best}/model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def by_gen_ppl(**options) -> dict:
    """Options of a run that scores samples and evaluates at every second step, and keeps the best checkpoint."""
    return {
        "max_steps": 8,
        "eval_steps": 2,
        "save_steps": 2,
        "ema_decay": 0.5,
        "eval_gen_ppl_steps": 2,
        "eval_gen_ppl_num_steps": [1, 2],
        "eval_gen_ppl_num_samples": 5,
        "eval_gen_ppl_model": SCORER,
        "metric_for_best_model": "eval_gen_ppl_1",
        "load_best_model_at_end": True,
        **options,
    }


def figures(log: list[dict], name: str) -> dict[int, float]:
    """What was logged of a figure, by step."""
    return {row["step"]: row[name] for row in log if name in row}


class TestSelectionByGenPPL:
    @staticmethod
    def build(output_dir, distill, **options) -> FLMTrainer:
        return (distillation if distill else build)(output_dir, **by_gen_ppl(**options))

    @pytest.mark.parametrize("metric", ["eval_gen_ppl_1", "gen_ppl_2", "eval_entropy_1"])
    @pytest.mark.parametrize("distill", [False, True])
    def test_metric_for_best_model_selects_the_averaged_weights_of_its_step(self, distill, metric, tmp_path):
        trainer = self.build(tmp_path, distill, metric_for_best_model=metric)
        is_ppl = "gen_ppl" in metric
        assert trainer.args.greater_is_better == (not is_ppl)
        trainer.train()
        measured = figures(trainer.state.log_history, f"eval_{metric.removeprefix('eval_')}")
        assert list(measured) == [2, 4, 6, 8]
        best = (min if is_ppl else max)(measured, key=measured.get)
        assert best < 8  # or loading the last weights would do
        assert trainer.state.best_global_step == best and trainer.state.best_metric == measured[best]
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
        # That checkpoint has the weights that were scored, and they are what the trainer has and saves.
        model = AutoModel.from_pretrained(tmp_path / f"checkpoint-{best}")
        num_steps = int(metric[-1])
        tokens = generate_samples(model, list(range(5)), trainer.args.seed, num_steps=num_steps).tolist()
        texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
        result = load_gen_ppl().compute(predictions=texts, token_ids=tokens, model_id=SCORER, device="cpu")
        assert result["gen_ppl" if is_ppl else "entropy"] == pytest.approx(measured[best], rel=1e-6)
        trainer.save_model(tmp_path / "best")
        saved = AutoModel.from_pretrained(tmp_path / "best").state_dict()
        average = trainer.ema.averaged.module.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(saved[name], tensor) and torch.equal(average[name], tensor)
        # After the training there is no figure of the weights that it has now.
        assert "eval_gen_ppl_1" not in trainer.evaluate()

    def test_save_strategy_best_saves_at_new_minima(self, tmp_path):
        trainer = self.build(tmp_path, False, save_strategy="best", load_best_model_at_end=False, max_steps=12)
        trainer.train()
        measured = figures(trainer.state.log_history, "eval_gen_ppl_1")
        minima = [step for step in measured if measured[step] == min(measured[n] for n in measured if n <= step)]
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in minima}
        assert 1 < len(minima) < len(measured) == 6
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{minima[-1]}")

    def test_evaluation_after_the_last_step_is_scored_too(self, tmp_path):
        trainer = self.build(tmp_path, False, max_steps=5)
        trainer.train()
        assert list(figures(trainer.state.log_history, "eval_gen_ppl_1")) == [2, 4, 5]

    def test_early_stopping_sees_gen_ppl(self, tmp_path):
        trainer = build(tmp_path, **by_gen_ppl(greater_is_better=True, max_steps=40))
        stopping = FLMTrainer(
            trainer.model,
            trainer.args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            processing_class=trainer.processing_class,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        )
        stopping.train()
        measured = list(figures(stopping.state.log_history, "eval_gen_ppl_1").values())
        assert len(measured) < 20
        assert measured[-1] <= max(measured[:-1]) and measured[:-1] == sorted(measured[:-1])

    def test_figures_stay_out_of_evaluations_at_other_steps(self, tmp_path):
        seen = {}

        class Record(TrainerCallback):
            def on_evaluate(self, args, state, control, metrics=None, **kwargs):
                seen[state.global_step] = set(metrics)

        options = {"metric_for_best_model": None, "load_best_model_at_end": False, "eval_gen_ppl_steps": 4}
        trainer = self.build(tmp_path, False, **options)
        trainer.add_callback(Record())
        trainer.train()
        assert [step for step in seen if "eval_gen_ppl_1" in seen[step]] == [4, 8]
        assert list(seen) == [2, 4, 6, 8]

    @pytest.mark.parametrize("fsdp", [False, True])
    def test_two_processes_select_by_gen_ppl_as_one_does(self, fsdp, tmp_path):
        one = self.build(tmp_path / "one", False, per_device_train_batch_size=16, max_steps=6)
        one.train()
        logs = [process["log"] for process in launch(tmp_path / "two", 2, fsdp=fsdp, **by_gen_ppl(max_steps=6))]
        measured = figures(logs[0], "eval_gen_ppl_1")
        assert measured == figures(logs[1], "eval_gen_ppl_1") and list(measured) == [2, 4, 6]
        assert measured == pytest.approx(figures(one.state.log_history, "eval_gen_ppl_1"), rel=1e-3)
        # Both have loaded the best checkpoint; the first has saved it.
        assert min(measured, key=measured.get) == 4
        best = tmp_path / "two" / "checkpoint-4"
        saved, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", best))
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())

    @pytest.mark.parametrize("arguments_class", [FLMTrainingArguments, FMLMTrainingArguments])
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"eval_gen_ppl_steps": 0}, "the figures of samples: pass `eval_gen_ppl_steps`"),
            ({"metric_for_best_model": "eval_gen_ppl_3"}, "to be one of `eval_gen_ppl_num_steps`.* eval_gen_ppl_1, "),
            ({"metric_for_best_model": "gen_ppl"}, "to be one of `eval_gen_ppl_num_steps`.* eval_gen_ppl_1, "),
            ({"metric_for_best_model": "entropy_3"}, "to be one of `eval_gen_ppl_num_steps`"),
            ({"eval_steps": 3, "save_steps": 3}, "`eval_steps` as a multiple of `eval_gen_ppl_steps=2`, got 3"),
            ({"eval_steps": 0.1, "save_steps": 0.1}, "`eval_steps` as a multiple of `eval_gen_ppl_steps=2`, got 0.1"),
            ({"eval_steps": None, "logging_steps": 5}, "`eval_steps` as a multiple of `eval_gen_ppl_steps=2`, got 5"),
            ({"eval_strategy": "no"}, "pass `eval_strategy='steps'` and `eval_steps=2`, got `eval_strategy='no'`"),
            ({"eval_strategy": "epoch", "save_strategy": "epoch"}, "pass `eval_strategy='steps'`.* got .*'epoch'"),
        ],
    )
    def test_metric_for_best_model_that_no_evaluation_has(self, arguments_class, options, message, tmp_path):
        with pytest.raises(ValueError, match=f"`metric_for_best_model='.*'` needs .*{message}"):
            arguments_class(tmp_path, **{"eval_strategy": "steps", **by_gen_ppl(**options)})

    def test_greater_is_better_defaults_to_false_for_gen_ppl(self, tmp_path):
        for options, expected in (
            ({}, False),
            ({"greater_is_better": True}, True),
            ({"metric_for_best_model": "entropy_2"}, True),
            ({"metric_for_best_model": "eval_loss", "eval_gen_ppl_steps": 0}, False),
            ({"metric_for_best_model": "eval_accuracy"}, True),
        ):
            args = FLMTrainingArguments(tmp_path, eval_strategy="steps", **by_gen_ppl(**options))
            assert args.greater_is_better == expected


class TestResume:
    def test_equals_uninterrupted_training(self, tmp_path):
        straight = build(tmp_path / "straight", dropout=0.1)
        straight.train()
        build(tmp_path / "resumed", dropout=0.1, max_steps=10).train()
        resumed = build(tmp_path / "resumed", dropout=0.1)
        resumed.train(resume_from_checkpoint=True)
        assert logged(resumed, "loss") == logged(straight, "loss") and len(logged(straight, "loss")) == 20
        assert logged(resumed, "eval_loss") == logged(straight, "eval_loss")
        for first, second in ((straight.model, resumed.model), (straight.ema.averaged, resumed.ema.averaged)):
            second = second.state_dict()
            assert all(torch.equal(tensor, second[name]) for name, tensor in first.state_dict().items())

    def test_from_a_checkpoint_without_an_average_warns(self, tmp_path, caplog):
        build(tmp_path, max_steps=10, ema_decay=None).train()
        resumed = build(tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert "has no training_weights.safetensors" in caplog.text
        assert resumed.ema.num_updates == 10

    def test_without_an_average_goes_on_from_the_weights_of_the_training(self, tmp_path):
        straight = build(tmp_path)
        straight.train()
        resumed = build(tmp_path, ema_decay=None)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert torch.equal(resumed.model.embed_tokens.weight, straight.model.embed_tokens.weight)


class TestProcesses:
    def test_two_processes_see_and_learn_what_one_does(self, tmp_path):
        options = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "ema_decay": 0.9, "prompt_fraction": 0.7}
        (one,) = launch(tmp_path / "one", 1, per_device_train_batch_size=16, **options)
        two = launch(tmp_path / "two", 2, per_device_train_batch_size=8, **options)

        # The same tokens with the same times and noise in every step, each in one of the processes.
        def unpadded(rows):
            return sorted(
                (step, time, [token for token in tokens if token], noise) for step, tokens, time, noise in rows
            )

        assert unpadded(one["seen"]) == unpadded(two[0]["seen"] + two[1]["seen"])
        np.testing.assert_allclose(logged(two[0]["log"], "loss"), logged(one["log"], "loss"), rtol=1e-4)
        np.testing.assert_allclose(logged(two[0]["log"], "grad_norm"), logged(one["log"], "grad_norm"), rtol=1e-3)
        np.testing.assert_allclose(logged(two[0]["log"], "eval_loss"), logged(one["log"], "eval_loss"), rtol=1e-4)
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)

    def test_sharded_weights_learn_and_write_what_whole_ones_do(self, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "ema_decay": 0.9, "sample_steps": 4}
        options |= {"load_best_model_at_end": True}
        options |= {"eval_gen_ppl_steps": 4, "eval_gen_ppl_num_samples": 3, "eval_gen_ppl_num_steps": [2]}
        options |= {"eval_gen_ppl_model": SCORER}
        whole = build(tmp_path / "one", per_device_train_batch_size=16, **options)
        whole.train()
        whole.save_model()
        log = launch(tmp_path / "two", 2, fsdp=True, **options)[0]["log"]
        for name in ("loss", "grad_norm", "eval_loss", "eval_gen_ppl_2", "eval_entropy_2"):
            assert logged(log, name) == pytest.approx(logged(whole, name), rel=1e-3) != []
        assert (tmp_path / "two" / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()
        # The average, loaded as anybody loads it, and the weights of the training.
        for name in (
            "model.safetensors",
            "checkpoint-4/model.safetensors",
            "checkpoint-4/training_weights.safetensors",
        ):
            first, second = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
            for key, tensor in first.items():
                torch.testing.assert_close(second[key], tensor, rtol=1e-3, atol=1e-5)
        files = [{path.name for path in (tmp_path / folder).iterdir() if path.is_file()} for folder in ("one", "two")]
        assert files[1] - files[0] == {"process-0.json", "process-1.json"}
        config = json.loads((tmp_path / "two" / "config.json").read_text())
        assert config == json.loads((tmp_path / "one" / "config.json").read_text())

        shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
        options["resume_from_checkpoint"] = str(tmp_path / "again" / "checkpoint-2")
        resumed = launch(tmp_path / "again", 2, fsdp=True, **options)[0]["log"]
        assert logged(resumed, "loss") == logged(log, "loss")
        first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("two", "again"))
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items())

    @pytest.mark.slow
    @pytest.mark.parametrize("distill", [False, True])
    def test_mixed_precision_is_the_same_with_sharded_weights(self, distill, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_strategy": "no", "bf16": True}
        log = launch(tmp_path, 2, fsdp=True, distill=distill, **options)[0]["log"]
        low, exact = (
            (distillation if distill else build)(tmp_path, per_device_train_batch_size=16, **{**options, "bf16": bf16})
            for bf16 in (True, False)
        )
        low.train(), exact.train()
        for name in ("loss", "eval_loss"):
            assert logged(log, name) == pytest.approx(logged(low, name), rel=2e-4)
        # which is closer than bfloat16 is to float32
        assert logged(log, "loss") != pytest.approx(logged(exact, "loss"), rel=1e-6)


class TestSamples:
    def test_are_written_during_training_from_the_averaged_weights(self, tmp_path):
        tokenizer = train_tokenizer(["a b c d e f g"], "word", 40)
        trainer = build(tmp_path, max_steps=4)
        options = {"sample_steps": 2, "sample_num_samples": 3, "sample_num_steps": 5}
        args = FLMTrainingArguments(tmp_path, max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, **options)
        sampling = FLMTrainer(trainer.model, args, train_dataset=trainer.train_dataset, processing_class=tokenizer)
        sampling.train()
        rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        assert [(row["step"], row["num_steps"]) for row in rows] == [(2, 5)] * 3 + [(4, 5)] * 3
        with sampling.ema.applied(sampling.model):
            tokens = sampling.model.eval().generate(
                num_samples=3, num_steps=5, generator=torch.Generator().manual_seed(42)
            )
        assert [row["text"] for row in rows[3:]] == tokenizer.batch_decode(tokens, skip_special_tokens=True)


class TestArguments:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"ema_decay": 1.0}, "`ema_decay`"),
            ({"sample_steps": -1}, "`sample_steps`"),
            ({"sample_num_steps": 0}, "`sample_num_steps`"),
            ({"sample_num_samples": 0}, "`sample_num_samples`"),
        ],
    )
    def test_bad_values(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            FLMTrainingArguments(tmp_path, **options)

    def test_published_defaults(self, tmp_path):
        args = FLMTrainingArguments(tmp_path)
        assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (3e-4, 0.9, 0.999, 0.0)
        assert (args.ema_decay, args.max_grad_norm, args.lr_scheduler_type) == (0.9999, 1.0, "constant_with_warmup")

    def test_trainer_refuses(self, tmp_path):
        from transformers import TrainingArguments

        with pytest.raises(TypeError, match="`args` must be `FLMTrainingArguments`"):
            FLMTrainer(build_flm(), TrainingArguments(tmp_path))
        tokenizer = train_tokenizer(["a b c d e f g"], "word", 40)
        with pytest.raises(ValueError, match="`processing_class` has 11 tokens, but the model's `vocab_size` is 5"):
            FLMTrainer(build_flm(vocab_size=5), FLMTrainingArguments(tmp_path), processing_class=tokenizer)
        with pytest.raises(ValueError, match="`sample_steps` needs a tokenizer"):
            FLMTrainer(build_flm(), FLMTrainingArguments(tmp_path, sample_steps=1))

    def test_low_precision_weights_are_not_averaged(self, tmp_path):
        model = build_flm().to(torch.bfloat16)
        with pytest.raises(ValueError, match="load it with `dtype=torch.float32`, and pass `bf16=True`"):
            FLMTrainer(model, FLMTrainingArguments(tmp_path))
        FLMTrainer(model, FLMTrainingArguments(tmp_path, ema_decay=None))

    def test_no_average(self, tmp_path):
        trainer = build(tmp_path, max_steps=2, ema_decay=None)
        assert not any(isinstance(callback, EMACallback) for callback in trainer.callback_handler.callbacks)
        trainer.train()
        trainer.save_model()
        assert torch.equal(AutoModel.from_pretrained(tmp_path).embed_tokens.weight, trainer.model.embed_tokens.weight)
