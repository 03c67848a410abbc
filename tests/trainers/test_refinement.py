"""Refinement in the loop: known tokens where the model itself is most confident."""

import pytest
import torch
from datasets import Dataset
from small_models import build_flm, build_model
from train_tiny import logged

from modeling_flm.joint_noise import JointNoise
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, FMLMTrainingArguments, make_flow_batch
from modeling_flm.trainers.batches import draw_known_masks, draw_noise, example_seed, stratified_uniforms
from modeling_flm.trainers.refinement import _ROUNDS, commit_confident, draw_num_rounds


def test_number_of_rounds():
    seeds, real = range(4000), torch.ones(4000, 8, dtype=torch.bool)
    assert draw_num_rounds(seeds, 1.0, ["random", "prefix"], 4) == [0] * 4000
    rounds = torch.tensor(draw_num_rounds(seeds, 1.0, ["confident"], 4))
    assert torch.bincount(rounds).tolist() == pytest.approx([1000] * 4, abs=120)
    # Examples of other kinds have known tokens, and no rounds
    kinds = ["prefix", "confident"]
    rounds = torch.tensor(draw_num_rounds(seeds, 0.5, kinds, 4)) > 0
    known = draw_known_masks(seeds, real, 8, 0.5, kinds).any(dim=1)
    assert not (rounds & known).any()
    assert known.sum().item() == pytest.approx(1000, abs=120) and rounds.sum().item() == pytest.approx(750, abs=120)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flm", "fmlm"])
def test_commits_the_most_confident_tokens(kind):
    torch.manual_seed(0)
    model = build_model(kind, per_token_timesteps=True)
    input_ids = torch.randint(53, (4, 10))
    labels = input_ids.clone()
    labels[2, :3] = -100  # a prompt
    examples = {"input_ids": input_ids, "labels": labels}
    options = {"max_length": 12, "prompts_from_labels": True}
    batch = make_flow_batch(examples, stratified_uniforms(4, 1, 0), range(4), (0, 0), **options)
    rounds, noise = [0, 1, 2, 3], JointNoise.of_networks(model)
    result = commit_confident(model, batch, rounds, 4, noise, 12, torch.no_grad)
    for row, count in enumerate(rounds):
        known = labels[row] == -100
        for round in range(count):
            seeds = [example_seed(batch.noise_seeds[row], _ROUNDS, round)]
            state = draw_noise(seeds, 12, noise.size, device="cpu")[:, :10] @ noise.factor(0)
            state = torch.where(known[None, :, None], model.state_embedding[input_ids[row : row + 1]], state)
            times = {"timesteps": known[None].float(), "target_timesteps": torch.ones(1, 10)}
            confidence = model(inputs_embeds=state, **times).logits.softmax(-1).amax(-1)[0]
            left = int((~known).sum())
            budget = -(-left // (4 - round))
            known[confidence.masked_fill(known, -1).topk(budget).indices] = True
        assert torch.equal(result.labels[row] == -100, known)
        assert torch.equal(result.labels[row][~known], input_ids[row][~known])
        assert torch.equal(result.tau_s[row] == 1, known) and result.tau_s[row][~known].unique().numel() == 1
    assert torch.equal(result.input_ids, input_ids)
    # Alone, an example has the same known tokens.
    alone = commit_confident(model, batch.select(torch.tensor([3])), [0], 4, noise, 12, torch.no_grad)
    assert torch.equal(alone.labels[0], labels[3])


class TestTraining:
    def trainer(self, path, **options):
        torch.manual_seed(0)
        flm = build_flm(per_token_timesteps=True, dropout=0.1).train()
        rows = Dataset.from_dict({"input_ids": torch.randint(53, (48, 12)).tolist()})
        defaults = {
            "max_steps": 8,
            "save_steps": 4,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "use_cpu": True,
        }
        defaults |= {
            "report_to": [],
            "disable_tqdm": True,
            "prompt_fraction": 1.0,
            "prompt_kinds": ["confident", "independent"],
        }
        return FLMTrainer(flm, FLMTrainingArguments(path, **{**defaults, **options}), train_dataset=rows)

    def test_batches(self, tmp_path):
        trainer = self.trainer(tmp_path, prompt_kinds=["confident"])
        (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        known = batch.labels == -100
        assert torch.equal(known, batch.tau_s == 1) and count == (~known).sum()
        assert {0} < set(known.sum(dim=1).tolist()) <= {0, 3, 6, 9}
        assert trainer.model.training

    def test_resumes_bit_for_bit(self, tmp_path):
        straight, resumed = self.trainer(tmp_path), self.trainer(tmp_path)
        straight.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert logged(resumed, "loss") == logged(straight, "loss") and len(logged(straight, "loss")) == 8

    def test_accumulation_and_large_batches_agree(self, tmp_path):
        options = {"max_steps": 2, "save_strategy": "no"}
        small = self.trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
        large = self.trainer(tmp_path, **options)
        first, second = (
            trainer.get_batch_samples(iter(trainer.get_train_dataloader()), num, torch.device("cpu"))[0]
            for trainer, num in ((small, 2), (large, 1))
        )
        assert torch.equal(torch.cat([batch.labels for batch in first]), second[0].labels)

    def test_any_order_flow_map(self, tmp_path):
        model = build_model("fmlm", per_token_timesteps=True, time_reparameterization=None)
        rows = Dataset.from_dict({"input_ids": torch.randint(53, (16, 12)).tolist()})
        options = {"max_steps": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        options |= {"prompt_kinds": ["independent", "confident"], "eval_strategy": "steps", "eval_steps": 1}
        args = FMLMTrainingArguments.from_preset("any_order", output_dir=tmp_path, **options)
        trainer = FMLMTrainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert len(logged(trainer, "eval_loss")) == 2

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="`confident_rounds` must be at least 1"):
            self.trainer(tmp_path, confident_rounds=0)
