"""The moving average of the weights: its decay, and where it replaces the training weights."""

import pytest
import torch
from safetensors.torch import load_file
from train_tiny import build
from transformers import AutoModel, TrainerCallback


class TestAveragedWeights:
    def test_ema_decay_warms_up_as_published(self, tmp_path):
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
        torch.testing.assert_close(trainer.ema.averaged.embed_tokens.weight.double(), average, rtol=1e-5, atol=1e-7)
        assert trainer.ema.num_updates == 15

    def test_evaluation_and_save_model_use_the_average(self, tmp_path):
        trainer = build(tmp_path, ema_decay=0.9)
        trainer.train()
        average = trainer.ema.averaged
        raw = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        trainer.save_model()
        loaded = AutoModel.from_pretrained(tmp_path)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, average.state_dict()[name])
            assert torch.equal(raw[name], trainer.model.state_dict()[name]), "the training weights changed"
        assert not torch.equal(loaded.embed_tokens.weight, trainer.model.embed_tokens.weight)
        # A model with these weights and no average has the same evaluation loss.
        plain = build(tmp_path / "plain", ema_decay=None)
        plain.model.load_state_dict(loaded.state_dict())
        assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        checkpoint = load_file(tmp_path / "checkpoint-20" / "training_weights.safetensors")
        assert all(torch.equal(checkpoint[name], tensor) for name, tensor in raw.items())

    def test_training_weights_survive_an_interrupted_evaluation(self, tmp_path):
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
