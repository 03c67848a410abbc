"""Samples and generative perplexity during training, and selection of the best checkpoint by it."""

import json

import pytest
import torch
from datasets import Dataset
from oracle import SCORER
from safetensors.torch import load_file
from small_models import build_flm
from train_tiny import build, distillation, launch
from transformers import AutoModel, EarlyStoppingCallback, TrainerCallback

from modeling_flm.trainers import (
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainingArguments,
    generate_samples,
    load_gen_ppl,
    train_tokenizer,
)


class TestSamples:
    def test_sample_steps_write_samples_of_the_average(self, tmp_path):
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


class TestGenPPL:
    def test_eval_gen_ppl_steps_log_the_metric_of_the_average(self, tmp_path, gen_ppl):
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", 100)
        args = FLMTrainingArguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            eval_gen_ppl_steps=2,
            eval_gen_ppl_num_steps=[1, 3],
            eval_gen_ppl_num_samples=5,
            eval_gen_ppl_model=SCORER,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        dataset = Dataset.from_dict({"input_ids": torch.randint(53, (16, 12)).tolist()})
        trainer = FLMTrainer(build_flm(), args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        logs = {row["step"]: row for row in trainer.state.log_history if "eval_gen_ppl_1" in row}
        assert set(logs) == {2, 4} and trainer.model.training
        assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4]
        average = trainer.ema.averaged.eval()
        for num_steps in (1, 3):
            tokens = generate_samples(average, list(range(5)), args.seed, num_steps=num_steps).tolist()
            expected = gen_ppl(tokenizer.batch_decode(tokens, skip_special_tokens=True), token_ids=tokens)
            assert logs[4][f"eval_gen_ppl_{num_steps}"] == pytest.approx(expected["gen_ppl"], rel=1e-6)
            assert logs[4][f"eval_entropy_{num_steps}"] == pytest.approx(expected["entropy"], rel=1e-6)
        assert logs[2] != logs[4]

    def test_figures_of_empty_samples_are_not_logged(self, tmp_path, monkeypatch):
        trainer = build(
            tmp_path, max_steps=1, eval_gen_ppl_steps=1, eval_gen_ppl_num_steps=[1], eval_gen_ppl_model=SCORER
        )
        monkeypatch.setattr(trainer.processing_class, "batch_decode", lambda tokens, **options: [""] * len(tokens))
        trainer.train()
        log = [row for row in trainer.state.log_history if "eval_entropy_1" in row]
        assert len(log) == 1 and "eval_gen_ppl_1" not in log[0]

    def test_a_missing_eval_gen_ppl_model_fails_at_the_start(self, tmp_path):
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(49))], "word", 100)
        options = {"eval_gen_ppl_steps": 2, "eval_gen_ppl_model": str(tmp_path / "nowhere"), "report_to": []}
        args = FLMTrainingArguments(tmp_path, max_steps=2, use_cpu=True, disable_tqdm=True, **options)
        dataset = Dataset.from_dict({"input_ids": torch.randint(53, (16, 12)).tolist()})
        trainer = FLMTrainer(build_flm(), args, train_dataset=dataset, processing_class=tokenizer)
        with pytest.raises(OSError, match="nowhere"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="`eval_gen_ppl_steps` needs a tokenizer"):
            FLMTrainer(build_flm(), FLMTrainingArguments(tmp_path, eval_gen_ppl_steps=1))
        with pytest.raises(ValueError, match="`eval_gen_ppl_num_steps` must be numbers of at least 1"):
            FLMTrainingArguments(tmp_path, eval_gen_ppl_num_steps=[0, 1])


def by_gen_ppl(**options) -> dict:
    """Options of a run that scores samples and evaluates every second step, and keeps the best checkpoint."""
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
    """Returns the logged values of a figure by step."""
    return {row["step"]: row[name] for row in log if name in row}


class TestSelectionByGenPPL:
    @staticmethod
    def build(output_dir, distill, **options) -> FLMTrainer:
        return (distillation if distill else build)(output_dir, **by_gen_ppl(**options))

    @pytest.mark.parametrize("metric", ["eval_gen_ppl_1", "gen_ppl_2", "eval_entropy_1"])
    @pytest.mark.parametrize("distill", [False, True])
    def test_metric_for_best_model_selects_the_average_of_its_step(self, distill, metric, tmp_path):
        trainer = self.build(tmp_path, distill, metric_for_best_model=metric)
        is_ppl = "gen_ppl" in metric
        assert trainer.args.greater_is_better == (not is_ppl)
        trainer.train()
        measured = figures(trainer.state.log_history, f"eval_{metric.removeprefix('eval_')}")
        assert list(measured) == [2, 4, 6, 8]
        best = (min if is_ppl else max)(measured, key=measured.get)
        assert best < 8  # otherwise loading the last weights would pass
        assert trainer.state.best_global_step == best and trainer.state.best_metric == measured[best]
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
        # The checkpoint has the scored weights, and the trainer has and saves them.
        model = AutoModel.from_pretrained(tmp_path / f"checkpoint-{best}")
        num_steps = int(metric[-1])
        tokens = generate_samples(model, list(range(5)), trainer.args.seed, num_steps=num_steps).tolist()
        texts = trainer.processing_class.batch_decode(tokens, skip_special_tokens=True)
        result = load_gen_ppl().compute(predictions=texts, token_ids=tokens, model_id=SCORER, device="cpu")
        assert result["gen_ppl" if is_ppl else "entropy"] == pytest.approx(measured[best], rel=1e-6)
        trainer.save_model(tmp_path / "best")
        saved = AutoModel.from_pretrained(tmp_path / "best").state_dict()
        average = trainer.ema.averaged.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(saved[name], tensor) and torch.equal(average[name], tensor)
        # The figures are not of the weights that are loaded now.
        assert "eval_gen_ppl_1" not in trainer.evaluate()

    def test_save_strategy_best_saves_at_new_minima(self, tmp_path):
        trainer = self.build(tmp_path, False, save_strategy="best", load_best_model_at_end=False, max_steps=12)
        trainer.train()
        measured = figures(trainer.state.log_history, "eval_gen_ppl_1")
        minima = [step for step in measured if measured[step] == min(measured[n] for n in measured if n <= step)]
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in minima}
        assert 1 < len(minima) < len(measured) == 6
        assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{minima[-1]}")

    def test_the_evaluation_after_the_last_step_is_scored(self, tmp_path):
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

    @pytest.mark.slow
    @pytest.mark.parametrize("fsdp", [False, True])
    def test_two_processes_select_by_gen_ppl_like_one(self, fsdp, tmp_path):
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
    def test_metric_for_best_model_needs_a_figure_of_evaluations(self, arguments_class, options, message, tmp_path):
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
