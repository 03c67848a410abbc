"""A trainer of flow maps, and what it makes of a batch whose times and noise are given."""

import torch

from modeling_flm.flow import times_with_known
from modeling_flm.trainers import FMLMTrainer, FMLMTrainingArguments
from modeling_flm.trainers.batches import FlowBatch


def build_trainer(path, model, teacher=None, dataset=None, **options) -> FMLMTrainer:
    options.setdefault("self_distillation", teacher is None)
    args = FMLMTrainingArguments(path, use_cpu=True, report_to=[], disable_tqdm=True, **options)
    return FMLMTrainer(model, args, teacher=teacher, train_dataset=dataset, eval_dataset=dataset)


def build_batch(input_ids, noise, tau_s, tau_t, tau_u=None, known=None, **kinds) -> FlowBatch:
    tau_u = (tau_s + tau_t) / 2 if tau_u is None else tau_u
    tau_s, tau_t, tau_u = (times_with_known(tau, known) for tau in (tau_s, tau_t, tau_u))
    labels = input_ids if known is None else input_ids.masked_fill(known, -100)
    kinds = kinds or {"off_diagonal": list(range(len(input_ids)))}
    return FlowBatch(input_ids, labels, tau_s, tau_t, tau_u, noise=noise, kinds=kinds)


def compute_targets(trainer, batch: FlowBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets and their weights, dense."""
    with torch.no_grad():
        target, weights = trainer.compute_targets(batch, trainer._get_joint_noise())
        return target.dense(), weights


def states(trainer, batch: FlowBatch) -> list[torch.Tensor]:
    """What the networks see."""
    noised = (batch.input_ids, batch.tau_s, batch.noise, trainer._get_joint_noise(), trainer.network.time_map)
    with torch.no_grad():
        return [network.make_state(*noised) for network in trainer._networks()]


def compute_loss(trainer, batch: FlowBatch):
    """The loss of a batch that has its noise, and the outputs."""
    trainer._add_noise = lambda batch: batch
    return trainer.compute_loss(trainer.model, {"examples": batch}, return_outputs=True)
