"""Training in several processes, with whole and sharded weights, compared with one process."""

import json
import shutil

import numpy as np
import pytest
import torch
from oracle import SCORER
from safetensors.torch import load_file
from train_tiny import build, distillation, launch, logged


class TestProcesses:
    def test_two_processes_train_like_one(self, tmp_path):
        options = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "ema_decay": 0.9, "prompt_fraction": 0.7}
        options |= {"eval_likelihood_times": 2}
        (one,) = launch(tmp_path / "one", 1, per_device_train_batch_size=16, **options)
        two = launch(tmp_path / "two", 2, per_device_train_batch_size=8, **options)

        # Every step has the same tokens, times and noise, split over the processes.
        def unpadded(rows):
            return sorted(
                (step, time, [token for token in tokens if token], noise) for step, tokens, time, noise in rows
            )

        assert unpadded(one["seen"]) == unpadded(two[0]["seen"] + two[1]["seen"])
        np.testing.assert_allclose(logged(two[0]["log"], "loss"), logged(one["log"], "loss"), rtol=1e-4)
        np.testing.assert_allclose(logged(two[0]["log"], "grad_norm"), logged(one["log"], "grad_norm"), rtol=1e-3)
        np.testing.assert_allclose(logged(two[0]["log"], "eval_loss"), logged(one["log"], "eval_loss"), rtol=1e-4)
        np.testing.assert_allclose(logged(two[0]["log"], "eval_nll"), logged(one["log"], "eval_nll"), rtol=1e-3)
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)

    @pytest.mark.slow
    def test_sharded_weights_train_and_save_like_whole_ones(self, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "ema_decay": 0.9, "sample_steps": 4}
        options |= {"load_best_model_at_end": True, "eval_likelihood_times": 2}
        options |= {"eval_gen_ppl_steps": 4, "eval_gen_ppl_num_samples": 3, "eval_gen_ppl_num_steps": [2]}
        options |= {"eval_gen_ppl_model": SCORER}
        whole = build(tmp_path / "one", per_device_train_batch_size=16, **options)
        whole.train()
        whole.save_model()
        log = launch(tmp_path / "two", 2, fsdp=True, **options)[0]["log"]
        for name in ("loss", "grad_norm", "eval_loss", "eval_nll", "eval_gen_ppl_2", "eval_entropy_2"):
            assert logged(log, name) == pytest.approx(logged(whole, name), rel=1e-3) != []
        assert (tmp_path / "two" / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()
        # The average, as users load it, and the training weights.
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
    def test_a_sharded_head_by_itself_is_gathered_for_the_loss(self, tmp_path):
        options = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
        log = launch(tmp_path, 2, fsdp=True, wrap="Linear", **options)[0]["log"]
        whole = build(tmp_path, per_device_train_batch_size=16, **options)
        whole.train()
        assert logged(log, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("distill", [False, True])
    def test_bf16_is_the_same_with_sharded_weights(self, distill, tmp_path):
        options = {"max_steps": 4, "eval_steps": 2, "save_strategy": "no", "bf16": True}
        log = launch(tmp_path, 2, fsdp=True, distill=distill, **options)[0]["log"]
        low, exact = (
            (distillation if distill else build)(tmp_path, per_device_train_batch_size=16, **{**options, "bf16": bf16})
            for bf16 in (True, False)
        )
        low.train(), exact.train()
        for name in ("loss", "eval_loss"):
            assert logged(log, name) == pytest.approx(logged(low, name), rel=2e-4)
        # bfloat16 and float32 differ more
        assert logged(log, "loss") != pytest.approx(logged(exact, "loss"), rel=1e-6)
