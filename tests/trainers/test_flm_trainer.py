"""Training of FLMs: loss, prompts, BOS token, evaluation, checkpoints and errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from processes import run_processes
from small_models import build_flm
from tensors import noise_factors
from train_tiny import RecordingTrainer, build, logged
from transformers import AutoModel, DataCollatorForLanguageModeling

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.flow import interpolate
from modeling_flm.trainers import (
    EMACallback,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    train_tokenizer,
)
from modeling_flm.trainers.batches import FlowBatch


def record_batches(trainer: FLMTrainer) -> list[FlowBatch]:
    """Returns a list to which the trainer will add its batches, with noise."""
    batches, objective = [], trainer.training_objective
    trainer.training_objective = lambda batch, *args: batches.append(batch) or objective(batch, *args)
    return batches


class TestPrompts:
    def test_prompt_fraction_loss_covers_unknown_tokens_only(self, tmp_path):
        trainer = build(tmp_path, max_steps=3, gradient_accumulation_steps=2, save_strategy="no", prompt_fraction=0.8)
        model = trainer.model
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batches = record_batches(trainer)
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

    def test_prompts_from_labels(self, tmp_path):
        input_ids = torch.randint(53, (8, 12))
        labels = input_ids.clone()
        labels[:, :5] = -100
        rows = {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
        for options, expected in (({}, 12), ({"prompts_from_labels": True}, 7)):
            args = FLMTrainingArguments(tmp_path, use_cpu=True, report_to=[], **options)
            trainer = FLMTrainer(build_flm(), args, train_dataset=Dataset.from_dict(rows))
            (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
            tau = batch.tau_s
            assert tau.shape == ((8,) if expected == 12 else (8, 12)) and batch.mask.sum() == count == 8 * 7
            assert int((tau.expand(12, 8).T if tau.dim() == 1 else tau).lt(1).sum()) == 8 * expected
            assert expected == 12 or tau[:, :5].eq(1).all()

    def test_bad_prompt_kinds(self, tmp_path):
        for kinds in ([], ["suffix"]):
            with pytest.raises(ValueError, match="`prompt_kinds` must be a list of 'prefix', 'infill', 'random'"):
                FLMTrainingArguments(tmp_path, prompt_kinds=kinds)

    def test_per_token_timesteps_can_be_switched_on_for_trained_weights(self, tmp_path):
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
    def test_loss_is_the_cross_entropy_over_real_tokens_of_the_step(self, tmp_path):
        trainer = build(
            tmp_path, max_steps=1, gradient_accumulation_steps=3, trainer_class=RecordingTrainer, save_strategy="no"
        )
        model = trainer.model
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.seen.clear()
        batches = record_batches(trainer)
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

    def test_times_are_stratified_over_the_global_batch(self, tmp_path):
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
        # Labels count. Other columns are ignored, also if they have names of `forward`'s arguments.
        trainer = build(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
        rows = trainer.train_dataset.to_dict()["input_ids"]
        dataset = trainer.train_dataset.add_column("labels", [[-100] * len(row) for row in rows])
        dataset = dataset.add_column("t", [0.5] * len(rows)).add_column("noise", [0.1] * len(rows))
        trainer.train_dataset = dataset
        trainer.train()
        assert logged(trainer, "loss")[0] == 0

    def test_group_by_length_reduces_padding(self, tmp_path):
        def share_of_padding(strategy):
            options = {"save_strategy": "no", "eval_strategy": "no", "train_sampling_strategy": strategy}
            trainer = build(tmp_path, max_steps=15, **options)
            batches, training_step = [], trainer.training_step
            trainer.training_step = lambda model, *args: batches.append(args[0]) or training_step(model, *args)
            trainer.train()
            masks = [
                torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
                for batch in batches
            ]
            return 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)

        assert share_of_padding("group_by_length") < share_of_padding("random") / 2


class StreamOfExamples(torch.utils.data.IterableDataset):
    """A dataset that allows only one pass."""

    def __init__(self, examples):
        self.examples = iter(examples)

    def __iter__(self):
        return self.examples


class TestBosToken:
    options = {"max_steps": 5, "save_strategy": "no", "eval_strategy": "no", "trainer_class": RecordingTrainer}

    @staticmethod
    def answer(caplog) -> str:
        (record,) = [record for record in caplog.records if "training examples begin" in record.message]
        return f"{record.levelname}: {record.message}"

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("with_bos", [False, True])
    def test_bos_token_is_kept_if_examples_begin_with_it(self, with_bos, streaming, tmp_path, caplog):
        caplog.set_level("INFO", "modeling_flm.trainers.data.checking")
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
            assert "INFO: 16 of the first 32 training examples begin with the BOS token (1)" in self.answer(caplog)
        else:
            assert "WARNING: None of the first 32 training examples begin with the BOS token (1)" in self.answer(
                caplog
            )
        if streaming:  # the training has read the dataset from the start
            seen = [[token for token in row[1] if token] for row in trainer.seen]
            assert seen == rows[: len(seen)] and len(seen) == 40

    def test_bos_token_stays_for_datasets_of_one_pass(self, tmp_path, caplog):
        trainer = build(tmp_path, **self.options)
        rows = trainer.train_dataset.to_list()
        trainer.train_dataset = StreamOfExamples(rows)
        trainer.seen.clear()
        trainer.train()
        assert [[token for token in row[1] if token] for row in trainer.seen] == [
            row["input_ids"] for row in rows[:40]
        ]
        assert trainer.model.generation_config.bos_token_id == trainer.processing_class.bos_token_id
        assert "It is unknown where texts begin and end in the training examples" in caplog.text

    def test_evaluate_keeps_the_bos_token(self, tmp_path):
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
    """Training in one of several processes. Only the first has examples that begin with the BOS token."""
    trainer = build(output_dir, max_steps=1, save_strategy="no", eval_strategy="no")
    index = trainer.args.process_index
    if index == 0:
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"input_ids": [1, *row["input_ids"][1:]]})
    trainer.train()
    Path(output_dir, f"bos-{index}").write_text(str(trainer.model.generation_config.bos_token_id))


class TestEvaluation:
    def test_eval_loss_is_deterministic_and_independent_of_the_batch_size(self, tmp_path):
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

    def test_evaluation_of_a_plain_iterable_of_batches(self, tmp_path):
        trainer = build(tmp_path, eval_strategy="no")
        expected = trainer.evaluate()["eval_loss"]
        batches = list(trainer.get_eval_dataloader())
        trainer.get_eval_dataloader = lambda dataset=None: batches
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)

    def test_predict_returns_logits(self, tmp_path):
        trainer = build(tmp_path, max_steps=1)
        trainer.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape[-1]}
        assert trainer.evaluate()["eval_shape"] == 40


class TestResume:
    def test_resume_from_checkpoint_equals_uninterrupted_training(self, tmp_path):
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

    def test_resume_from_a_checkpoint_without_an_average_warns(self, tmp_path, caplog):
        build(tmp_path, max_steps=10, ema_decay=None).train()
        resumed = build(tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert "has no training_weights.safetensors" in caplog.text
        assert resumed.ema.num_updates == 10

    def test_resume_without_an_average_continues_the_training_weights(self, tmp_path):
        straight = build(tmp_path)
        straight.train()
        resumed = build(tmp_path, ema_decay=None)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert torch.equal(resumed.model.embed_tokens.weight, straight.model.embed_tokens.weight)


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

    def test_weights_decay_but_no_norms_and_biases(self, tmp_path):
        trainer = build(tmp_path)
        model = trainer.model
        names = {name for name, value in model.named_parameters() if value.dim() == 2}
        assert set(trainer.get_decay_parameter_names(model)) == names

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` has no effect"),
            ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` has no effect"),
            ({"learning_rate": -1.0}, "`learning_rate` must be at least 0"),
            ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1"),
        ],
    )
    def test_bad_inherited_arguments(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            FLMTrainer(build_flm(), FLMTrainingArguments(tmp_path, use_cpu=True, report_to=[], **options))

    def test_bad_combinations(self, tmp_path):
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


class Texts(torch.utils.data.Dataset):
    """A dataset that is no `datasets.Dataset`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index]}


class TestBadDatasets:
    @staticmethod
    def make(path, **options) -> FLMTrainer:
        args = FLMTrainingArguments(path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1)
        return FLMTrainer(build_flm(), args, **options)

    @pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
    @pytest.mark.parametrize(
        "dataset, message",
        [
            (Dataset.from_dict({"text": ["a cat"]}), "needs a column `input_ids`, but has text: make them with `pack"),
            (Dataset.from_dict({"text": ["a cat"]}).to_iterable_dataset(), "needs a column `input_ids`"),
            (Dataset.from_dict({"input_ids": []}), "`{name}` is empty"),
            (Texts([]), "`{name}` is empty"),
            (Dataset.from_dict({"input_ids": [[1] * 13]}), "have 13 tokens, but the model was made for at most 12"),
            (Texts([torch.ones(5).long(), torch.ones(13).long()]), "or build the model with `max_position_embeddings=13`"),
            (Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]]}), "`labels` of `{name}` are all -100"),
            (Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 3]]}), "`labels` of `{name}` must equal `input_ids`"),
            (Dataset.from_dict({"input_ids": [[]]}), "`input_ids` of `{name}` must be lists of one or more tokens, got "),
            (Dataset.from_dict({"input_ids": ["a cat"]}), "`{name}` must be lists of one or more tokens, got 'a cat': make"),
            (Dataset.from_dict({"input_ids": [[[1, 2]]]}), "`{name}` must be lists of one or more tokens"),
            (Dataset.from_dict({"input_ids": [[1, 53]]}), "have the token 53, but the model's are 0 to 52"),
        ],
    )  # fmt: skip
    def test_bad_datasets_are_refused_at_once(self, name, dataset, message, tmp_path):
        with pytest.raises(ValueError, match=message.format(name=name)):
            self.make(tmp_path, **{name: dataset})

    @pytest.mark.parametrize("kind", [DatasetDict, dict])
    def test_splits(self, kind, tmp_path):
        splits = kind({"train": Dataset.from_dict({"input_ids": [[1, 2]]})})
        with pytest.raises(
            ValueError, match=r"`train_dataset` has the splits train: pass one, such as `dataset\['train'\]`"
        ):
            self.make(tmp_path, train_dataset=splits)
        with pytest.raises(ValueError, match=r"`eval_dataset\['long'\]`"):
            long = Dataset.from_dict({"input_ids": [[1] * 20]})
            self.make(tmp_path, eval_dataset={"train": splits["train"], "long": long})

    def test_bad_examples_after_the_first_ones(self, tmp_path):
        rows = [[1] * 5] * 40
        for last, message in (([1] * 13, "have 13 tokens"), ([60], "have the token 60")):
            trainer = self.make(tmp_path, train_dataset=Dataset.from_dict({"input_ids": [*rows, last]}))
            trainer.args.per_device_train_batch_size = trainer._train_batch_size = 41
            with pytest.raises(ValueError, match=message):
                trainer.train()

    def test_custom_data_collator_may_read_other_columns(self, tmp_path):
        def collate(examples):
            input_ids = torch.tensor([[example["number"]] * 12 for example in examples])
            return {"input_ids": input_ids, "labels": input_ids}

        args = FLMTrainingArguments(
            tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, remove_unused_columns=False
        )
        dataset = Dataset.from_dict({"number": list(range(20))})
        trainer = FLMTrainer(build_flm(), args, data_collator=collate, train_dataset=dataset)
        assert np.isfinite(trainer.train().training_loss)

    def test_data_collator_that_masks_tokens(self, tmp_path):
        tokenizer = train_tokenizer(["a b c"], "word", 20)
        tokenizer.mask_token = "[UNK]"
        rows = [{"input_ids": [1, 2, 3]}] * 4
        self.make(tmp_path, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
        with pytest.raises(ValueError, match="`data_collator` masks tokens.*`mlm=False`"):
            self.make(tmp_path, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer))

    def test_data_collator_without_labels(self, tmp_path):
        collate = lambda examples: {"input_ids": torch.tensor([example["input_ids"] for example in examples])}  # noqa: E731
        rows = Dataset.from_dict({"input_ids": [[1] * 12] * 16})
        with pytest.raises(ValueError, match="`data_collator` must make `labels`"):
            self.make(tmp_path, train_dataset=rows, data_collator=collate).train()

    def test_numbers_passed_as_strings(self, tmp_path):
        for name in ("learning_rate", "ema_decay", "max_steps"):
            with pytest.raises(ValueError, match=f"`{name}` must be a number, got the string '1e-3'"):
                FLMTrainingArguments(tmp_path, **{name: "1e-3"})


class TestModelInit:
    """`model_init`, which makes a model for every training."""

    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 3, "logging_steps": 1, "seed": 3}
    rows = {"input_ids": torch.arange(480).remainder(53).view(40, 12).tolist()}

    def make(self, path, make_model, **options) -> FLMTrainer:
        args = FLMTrainingArguments(path, save_strategy="no", **{**self.options, **options})
        dataset = Dataset.from_dict(self.rows)
        return FLMTrainer(model_init=make_model, args=args, train_dataset=dataset, eval_dataset=dataset)

    def test_training_again_is_the_same(self, tmp_path):
        trainer = self.make(tmp_path, lambda: build_flm(dropout=0.0))
        results = []
        for _ in range(2):
            trainer.train()
            results.append((trainer.evaluate()["eval_loss"], logged(trainer, "loss"), trainer.ema.num_updates))
            trainer.state.log_history.clear()
        assert results[0] == results[1] and len(results[0][1]) == 3 and results[0][2] == 3
        # The same as with `model`
        torch.manual_seed(3)
        args = FLMTrainingArguments(tmp_path, save_strategy="no", **self.options)
        dataset = Dataset.from_dict(self.rows)
        other = FLMTrainer(build_flm(dropout=0.0), args, train_dataset=dataset, eval_dataset=dataset)
        other.train()
        assert other.evaluate()["eval_loss"] == results[0][0]

    def test_bad_models(self, tmp_path):
        with pytest.raises(TypeError, match="`model` must be a `FLMModel`"):
            self.make(tmp_path, lambda: torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="Examples of `train_dataset` have 12 tokens"):
            self.make(tmp_path, lambda: build_flm(max_position_embeddings=6))
        with pytest.raises(ValueError, match="Pass a `model`, or as `model_init` a function"):
            FLMTrainer(args=FLMTrainingArguments(tmp_path, **self.options))

    def test_flow_maps(self, tmp_path):
        teacher = build_flm()
        args = FMLMTrainingArguments.from_preset("single_stage", output_dir=tmp_path, **self.options)
        trainer = FMLMTrainer(
            model_init=lambda: FMLMModel.from_flm(teacher),
            args=args,
            teacher=teacher,
            train_dataset=Dataset.from_dict(self.rows),
        )
        for _ in range(2):
            trainer.train()
        losses = logged(trainer, "loss")
        assert len(losses) == 3 and np.isfinite(losses).all()

    def test_hyperparameter_search(self, tmp_path):
        pytest.importorskip("optuna")
        widths = []

        def make_model(trial):
            hidden_size = 32 if trial is None else trial.suggest_categorical("hidden_size", [16, 32])
            widths.append(hidden_size)
            return build_flm(hidden_size=hidden_size)

        def space(trial):
            return {
                "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
                "ema_decay": trial.suggest_categorical("ema_decay", [0.5, 0.9]),
            }

        trainer = self.make(tmp_path, make_model, eval_strategy="epoch")
        decays = []
        best = trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda metrics: decays.append(trainer.ema.decay) or metrics["eval_loss"],
            n_trials=3,
            backend="optuna",
        )
        assert len(widths) == 4  # one for the trainer, and one for each trial
        assert np.isfinite(best.objective) and set(best.hyperparameters) >= {"learning_rate", "ema_decay"}
        assert set(decays) <= {0.5, 0.9} and decays
