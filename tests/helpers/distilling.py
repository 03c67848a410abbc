"""Trainer of flow maps, with its targets and loss for batches of chosen times and noise."""

from dataclasses import replace

import torch

from modeling_flm.joint_noise import JointNoise
from modeling_flm.trainers import FMLMTrainer, FMLMTrainingArguments
from modeling_flm.trainers.batches import FlowBatch, FlowTimes, make_flow_batch


def build_trainer(path, model, teacher=None, dataset=None, **options) -> FMLMTrainer:
    options.setdefault("self_distillation", teacher is None)
    args = FMLMTrainingArguments(path, use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return FMLMTrainer(model, args, teacher=teacher, train_dataset=dataset, eval_dataset=dataset)


def build_batch(input_ids, noise, tau_s, tau_t, tau_u=None, known=None, **groups) -> FlowBatch:
    groups = groups or {"off_diagonal": list(range(len(input_ids)))}
    times = FlowTimes(tau_s, tau_t, (tau_s + tau_t) / 2 if tau_u is None else tau_u, groups)
    examples = {"input_ids": input_ids, "labels": input_ids if known is None else input_ids.masked_fill(known, -100)}
    options = {"time_sampler": lambda *_: times, "prompts_from_labels": known is not None}
    return replace(make_flow_batch(examples, None, range(len(input_ids)), (), **options), noise=noise)


def joint_noise(trainer) -> JointNoise:
    """Returns the joint noise of student and teacher."""
    networks = [network for network in (trainer.network, trainer.teacher) if network is not None]
    return JointNoise.of_networks(*networks, frozen=trainer.teacher)


def compute_targets(trainer, batch: FlowBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns dense targets and their weights."""
    with torch.no_grad():
        target, weights = trainer.compute_targets(batch, joint_noise(trainer))
        return target.dense(), weights


def states(trainer, batch: FlowBatch) -> list[torch.Tensor]:
    """Returns the noised states of student and teacher."""
    noised = (batch.input_ids, batch.tau_s, batch.noise, joint_noise(trainer), trainer.network.time_map)
    networks = [network for network in (trainer.network, trainer.teacher) if network is not None]
    with torch.no_grad():
        return [network.make_state(*noised) for network in networks]


def compute_loss(trainer, batch: FlowBatch):
    """Returns the loss of a batch, and the outputs."""
    return trainer.compute_loss(trainer.model, batch, return_outputs=True)
