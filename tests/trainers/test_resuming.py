"""Resuming: finished trainings, incomplete and damaged checkpoints, other models and tokenizers; and modes of files."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import build_flm
from train_tiny import build
from transformers import AutoModel

from modeling_flm.trainers import FLMTrainer, FMLMTrainingArguments, train_tokenizer
from modeling_flm.trainers.pushing import _RECORDED_CHANGES, record_arguments


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><body>Not found</body></html>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A training of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("training")
    trainer = build(folder, max_steps=4, save_steps=2, eval_strategy="no")
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def training(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "training")
    return tmp_path / "training"


def resume(folder: Path, checkpoint: str | bool = True, **options):
    options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", **options}
    trainer = build(folder, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


class TestFinishedTraining:
    @pytest.mark.parametrize("options", [{}, {"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.1}])
    def test_is_left_as_it_is(self, options, training, caplog):
        before = {path: path.read_bytes() for path in training.rglob("*") if path.is_file()}
        for _ in range(2):
            trainer = resume(training, **options)
            assert trainer.state.global_step == 4
            assert "The training is finished: it has taken 4 steps" in caplog.text
            weights = AutoModel.from_pretrained(training).state_dict()
            assert all(torch.equal(value, weights[name]) for name, value in trainer.ema.averaged.state_dict().items())
        assert {path: path.read_bytes() for path in training.rglob("*") if path.is_file()} == before

    def test_goes_on_with_more_steps(self, training):
        assert resume(training, max_steps=5).state.global_step == 5


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-40])


class TestIncompleteCheckpoint:
    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    )
    @pytest.mark.parametrize("damage", [Path.unlink, cut])
    def test_the_last_complete_checkpoint_is_taken(self, damage, name, training, caplog):
        damage(training / "checkpoint-4" / name)
        state = json.loads((training / "checkpoint-2" / "trainer_state.json").read_text())
        assert resume(training).state.log_history[: len(state["log_history"])] == state["log_history"]
        assert "checkpoint-4" in caplog.text and f"resumes from {training / 'checkpoint-2'} instead" in caplog.text
        assert name.split(".")[0].split("_s")[0] in caplog.text

    @pytest.mark.parametrize("content", [b"", POINTER, PAGE, b"{}"])
    def test_training_weights(self, content, training, caplog):
        (training / "checkpoint-4" / "training_weights.safetensors").write_bytes(content)
        assert resume(training, max_steps=5).state.global_step == 5
        assert "checkpoint-4/training_weights.safetensors is" in caplog.text

    @pytest.mark.parametrize("name", ["trainer_state.json", "training.json"])
    @pytest.mark.parametrize("content", ["{}", "[]", "null", "5"])
    def test_json_of_another_kind(self, content, name, training, caplog):
        (training / "checkpoint-4" / name).write_text(content)
        assert resume(training).state.global_step == 4
        assert f"checkpoint-4/{name} is damaged: it has no" in caplog.text

    def test_without_a_complete_one(self, training):
        for step in (2, 4):
            cut(training / f"checkpoint-{step}" / "model.safetensors")
        with pytest.raises(ValueError, match="checkpoint-4/model.safetensors is truncated.*No earlier checkpoint"):
            resume(training)
        with pytest.raises(ValueError, match="checkpoint-2/model.safetensors is truncated.*Pass an earlier"):
            resume(training, str(training / "checkpoint-2"))

    def test_checkpoint_with_the_model_only(self, tmp_path):
        resume(tmp_path, None, max_steps=2, save_only_model=True)
        assert resume(tmp_path).state.global_step == 4


class TestOtherModel:
    def test_other_tokenizer_is_refused(self, training):
        trainer = build(training, max_steps=5, eval_strategy="no")
        trainer.processing_class = train_tokenizer([" ".join(f"v{n}" for n in range(36))], "word", vocab_size=40)
        with pytest.raises(ValueError, match="the tokenizer of .*checkpoint-4 has other tokens"):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        "sizes, name", [({"hidden_size": 16}, "embed_tokens"), ({"num_hidden_layers": 3}, "2.mlp")]
    )
    def test_other_size_is_refused(self, sizes, name, training):
        trainer = build(training, max_steps=5, eval_strategy="no")
        model = build_flm(**{"vocab_size": 40, "num_attention_heads": 2, "max_position_embeddings": 10, **sizes})
        trainer = FLMTrainer(model, trainer.args, train_dataset=trainer.train_dataset)
        with pytest.raises(ValueError, match=f"checkpoint-4 has a model of another size .*{name}"):
            trainer.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("num_attention_heads", 1),
            ("final_logit_softcapping", None),
            ("time_reparameterization", None),
            ("per_token_timesteps", True),
            ("max_position_embeddings", 12),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ],
    )
    def test_other_meaning_of_weights_is_refused(self, name, value, training):
        trainer = build(training, max_steps=5, eval_strategy="no")
        setattr(trainer.model.config, name, value)
        with pytest.raises(ValueError, match=f"checkpoint-4 has {name}=.*the settings that it was trained with"):
            trainer.train(resume_from_checkpoint=True)


# Fields of transformers without influence on the weights, but for rounding, or that the trainers refuse
FREE = """output_dir hub_ push_ log_ logging_ report_to run_name project trackio_ disable_tqdm save_ eval_ metric_for_best_model
    load_best_model greater_is_better batch_eval include_ prediction_loss per_device_eval do_ resume_from restore_callback
    ignore_data_skip enable_jit skip_memory debug bf16_full fp16_full tf32 activation_checkpointing gradient_checkpointing
    torch_ use_liger liger_ use_cache neftune label_ auto_find full_determinism use_cpu accelerator_config parallelism_config
    dataloader_num dataloader_p dataloader_m dataloader_in_order remove_unused ddp_ fsdp deepspeed local_rank"""
LENGTH = {"max_steps", "num_train_epochs"}


class TestOtherArguments:
    def test_every_argument_is_recorded_or_free(self, tmp_path):
        args = FMLMTrainingArguments(tmp_path, use_cpu=True)
        recorded = {*record_arguments(args), *_RECORDED_CHANGES}
        unknown = [each.name for each in fields(args) if each.name not in recorded | LENGTH]
        assert [name for name in unknown if not name.startswith(tuple(FREE.split()) + ("sample_",))] == []

    @pytest.mark.parametrize(
        "options, change",
        [
            ({}, None),
            ({"max_steps": 6, "logging_steps": 3, "sample_steps": 1, "dataloader_pin_memory": False}, None),
            ({"learning_rate": 1e-2}, "learning_rate from 0.003 to 0.01"),
            ({"seed": 4}, "seed from 3 to 4"),
            ({"ema_decay": 0.9}, "ema_decay from 0.9999 to 0.9"),
            ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps from 1 to 2"),
            ({"dataloader_drop_last": True}, "dataloader_drop_last from None to True"),
            ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type from constant_with_warmup to cosine"),
        ],
    )
    def test_changes_are_warned_of(self, options, change, training, caplog):
        resume(training, **options)
        assert ("differs from one without an interruption" in caplog.text) == (change is not None)
        assert change is None or f": {change}. Settings of the optimizer" in caplog.text

    def test_other_examples_are_warned_of(self, training, caplog):
        trainer = build(training, max_steps=4, eval_strategy="no")
        trainer.train_dataset = trainer.train_dataset.select(range(100))
        trainer.train(resume_from_checkpoint=True)
        assert "num_examples from 120 to 100" in caplog.text

    def test_other_optimizer_is_refused(self, training):
        with pytest.raises(ValueError, match="has the state of `optim` adamw_torch.*, got adafactor"):
            resume(training, optim="adafactor")


class TestStreams:
    """Streams of several epochs. An epoch has four batches."""

    @pytest.mark.parametrize("accumulation", [1, 3])
    @pytest.mark.parametrize("num_steps", [2, 4, 5])
    def test_resuming_in_a_later_epoch(self, num_steps, accumulation, tmp_path):
        weights = []
        for name, parts in {"whole": [6], "parts": [num_steps, 6]}.items():
            for max_steps in parts:
                trainer = self.build(tmp_path / name, max_steps, accumulation, num_examples=32)
                trainer.train(resume_from_checkpoint=None if max_steps == parts[0] else True)
            weights.append(trainer.network.state_dict())
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_epochs_without_a_step_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="fewer batches than `gradient_accumulation_steps`"):
            self.build(tmp_path, max_steps=2, accumulation=3, num_examples=8).train()

    @staticmethod
    def build(folder: Path, max_steps: int, accumulation: int, num_examples: int):
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulation}
        trainer = build(folder, max_steps=max_steps, save_steps=max_steps, eval_strategy="no", **options)
        examples = trainer.train_dataset.select(range(num_examples))
        trainer.train_dataset = examples.to_iterable_dataset().shuffle(seed=0, buffer_size=100)
        return trainer


def test_evaluation_drops_no_examples(tmp_path):
    losses = []
    for drop_last in (False, True):
        trainer = build(tmp_path, per_device_eval_batch_size=64, dataloader_drop_last=drop_last)
        losses.append(trainer.evaluate()["eval_loss"])
        assert trainer.args.dataloader_drop_last is drop_last
    assert losses[0] == losses[1]


def test_dropping_all_examples_is_refused(tmp_path):
    trainer = build(tmp_path, max_steps=2, per_device_train_batch_size=200, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="Nothing was trained: .*`dataloader_drop_last`"):
        trainer.train()


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
@pytest.mark.parametrize("adapter", [False, True])
def test_umask_decides_who_reads_files(adapter, mask, tmp_path):
    before = os.umask(mask)
    try:
        trainer = build(tmp_path / "out", max_steps=1, save_steps=1, eval_strategy="no")
        if adapter:
            model = get_peft_model(trainer.model, LoraConfig(target_modules=["qkv_proj"]))
            trainer = FLMTrainer(model, trainer.args, train_dataset=trainer.train_dataset)
        trainer.train()
        trainer.save_model()
        trainer.network.save_pretrained(tmp_path / "out" / "again", max_shard_size="10KB")
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in paths} >= {"training_weights.safetensors", "trainer_state.json"}
    assert {oct(path.stat().st_mode & 0o777) for path in paths} == {oct(0o666 & ~mask)}
