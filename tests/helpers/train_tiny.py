"""Training of a tiny model, in this process or in several processes that record their batches."""

import json
import os
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from processes import run_processes
from small_models import build_flm

from modeling_flm import FLMConfig, FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.trainers import (
    DistributionMatchingTrainer,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    train_tokenizer,
)


class Recording:
    """Keeps the tokens, times and noise of every training example."""

    seen = []

    def __init__(self, *args, **kwargs):
        uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if uses_fsdp:
            # accelerate shards on GPUs only: pretend that these are processes of GPUs.
            assert PartialState().device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(*args, **kwargs)
        assert self.is_fsdp_enabled == uses_fsdp

    def training_objective(self, batch, *args, **kwargs):
        if self.model.training:
            times = batch.tau_s if batch.tau_s.dim() == 1 else batch.tau_s.amin(dim=1)
            for row in zip(batch.input_ids, times, batch.noise):
                step = self.state.global_step
                self.seen.append([step, row[0].tolist(), row[1].item(), row[2][0].tolist()])
        return super().training_objective(batch, *args, **kwargs)


class RecordingTrainer(Recording, FLMTrainer):
    pass


class RecordingDistillation(Recording, FMLMTrainer):
    pass


class RecordingMatching(Recording, DistributionMatchingTrainer):
    pass


def distillation_trainer(preset: str) -> type[FMLMTrainer]:
    return DistributionMatchingTrainer if preset == "distribution_matching" else FMLMTrainer


def build(
    output_dir: str, dropout: float = 0.0, trainer_class: type[FLMTrainer] = FLMTrainer, **options
) -> FLMTrainer:
    torch.manual_seed(0)
    model = FLMModel(
        FLMConfig(
            vocab_size=40,
            hidden_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            conditioning_size=16,
            max_position_embeddings=10,
            dropout=dropout,
            per_token_timesteps=options.get("prompt_fraction", 0) > 0,
        )
    )
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 11, (120,), generator=generator).tolist()
    rows = [torch.randint(4, 40, (length,), generator=generator).tolist() for length in lengths]
    dataset = Dataset.from_dict({"input_ids": rows})
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_strategy": "steps",
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = FLMTrainingArguments(output_dir=output_dir, **{**defaults, **options})
    return trainer_class(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(21)),
        processing_class=train_tokenizer([" ".join(f"w{n}" for n in range(36))], "word", vocab_size=40),
    )


def distillation(
    output_dir, preset="single_stage", dropout=0.0, trainer_class=None, frozen_dtype=torch.float32, **options
):
    """Returns a trainer as from `build`, of a flow map instead of the FLM."""
    own = set(FMLMTrainingArguments.__annotations__)
    flm_trainer = build(output_dir, dropout=dropout, **{k: v for k, v in options.items() if k not in own})
    torch.manual_seed(5)
    teacher = flm_trainer.model.eval()
    for parameter in teacher.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    two_network = FMLMTwoNetworkModel.from_flm(teacher, learned_loss_weighting=True, dropout=dropout)
    if preset == "two_network":
        model, teacher = two_network, None
        model.flow.to(frozen_dtype)
    else:
        any_order = {"per_token_timesteps": True, "time_reparameterization": None} if preset == "any_order" else {}
        model = FMLMModel.from_flm(teacher, dropout=dropout, **any_order)
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # far from its targets
        teachers = {"second_stage": two_network, "self_distillation": None, "any_order": None}
        teacher = teachers.get(preset, teacher)
        teacher = None if teacher is None else teacher.to(frozen_dtype)
    settings = {name: getattr(flm_trainer.args, name) for name in (
        "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "logging_steps",
        "eval_strategy", "eval_steps", "save_strategy", "save_steps", "seed", "gradient_accumulation_steps", "ema_decay",
        "report_to", "use_cpu", "disable_tqdm", "bf16", "prompt_fraction", "eval_gen_ppl_steps", "eval_gen_ppl_num_steps",
        "eval_gen_ppl_num_samples", "eval_gen_ppl_model", "metric_for_best_model", "greater_is_better",
        "load_best_model_at_end",
    )}  # fmt: skip
    settings.update({name: value for name, value in options.items() if name in own})
    if preset == "any_order":
        del settings["prompt_fraction"]  # set by the preset
    args = FMLMTrainingArguments.from_preset(preset, output_dir=output_dir, **settings)
    return (trainer_class or distillation_trainer(preset))(
        model,
        args,
        teacher=teacher,
        train_dataset=flm_trainer.train_dataset,
        eval_dataset=flm_trainer.eval_dataset,
        processing_class=flm_trainer.processing_class,
    )


def build_packed(path, preset: str | None, vocab_size: int = 200, **options) -> FLMTrainer:
    """Returns a trainer with batches of eight packed examples of twelve tokens."""
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 8, **options}
    dataset = Dataset.from_dict({"input_ids": torch.randint(vocab_size, (64, 12)).tolist()})
    flm = build_flm(vocab_size=vocab_size, hidden_size=16, dropout=0.0)
    if preset is None:
        return FLMTrainer(flm.train(), FLMTrainingArguments(path, **options), train_dataset=dataset)
    two_networks = FMLMTwoNetworkModel.from_flm(flm, dropout=0.0)
    model = two_networks if preset == "two_network" else FMLMModel.from_flm(flm, dropout=0.0)
    torch.nn.init.normal_((model.correction if preset == "two_network" else model).lm_head.weight)
    teacher = {"second_stage": two_networks, "single_stage": flm, "distribution_matching": flm}.get(preset)
    args = FMLMTrainingArguments.from_preset(preset, output_dir=path, **options)
    return distillation_trainer(preset)(model, args, teacher=teacher, train_dataset=dataset)


def launch(output_dir: Path, num_processes: int, fsdp: bool = False, **options) -> list[dict]:
    """Trains in several processes, and returns the record of each."""
    run_processes(train, str(output_dir), options, fsdp, num_processes=num_processes, fsdp=fsdp)
    return [json.loads((output_dir / f"process-{index}.json").read_text()) for index in range(num_processes)]


def train(output_dir: str, options: dict, fsdp: bool):
    """Trains in one of these processes. `wrap` names the modules that FSDP shards as units."""
    if "wrap" in options:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = options.pop("wrap")
    if options.pop("distill", False):
        is_matching = options.get("preset") == "distribution_matching"
        recording = RecordingMatching if is_matching else RecordingDistillation
        trainer = distillation(output_dir, trainer_class=recording, **options)
    else:
        trainer = build(output_dir, trainer_class=RecordingTrainer, **options)
    assert trainer.is_fsdp_enabled == fsdp
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    result = {"seen": trainer.seen, "log": trainer.state.log_history}
    Path(output_dir, f"process-{trainer.args.process_index}.json").write_text(json.dumps(result))


def logged(trainer_or_log: FLMTrainer | list[dict], name: str) -> list[float]:
    """Returns all logged values of a quantity."""
    log = trainer_or_log.state.log_history if isinstance(trainer_or_log, FLMTrainer) else trainer_or_log
    return [row[name] for row in log if name in row]
