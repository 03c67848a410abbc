# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Trainer of flow maps. Every distillation objective of the paper is a target and a divergence."""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.flow import remaining_noise
from modeling_flm.hub.loading import load_checked
from modeling_flm.hub.records import is_hub_name
from modeling_flm.joint_noise import JointNoise
from modeling_flm.posterior_flm import Posterior
from modeling_flm.utils_flm import evaluating

from .adapters import unwrap_model
from .batches import MIN_DIFFERENCE, FlowBatch, TimePairs
from .flm_trainer import FLMTrainer
from .fmlm_config import FMLMTrainingArguments
from .objectives import assemble, eulerian_target, lagrangian_target, masked_posterior, posterior_of, semigroup_target


logger = logging.get_logger(__name__)


class FMLMTrainer(FLMTrainer):
    r"""
    Trains a flow map \\(\delta_{s,t}\\). Each example has two times. Where they are equal (the diagonal), the target is the
    teacher's denoiser, or the data if there is no teacher. Where they differ, `args.target` chooses the target, made of the
    flow map itself or of the teacher. Targets are detached.

    All networks read the same noise, each through its own embedding. Evaluation, averaged weights, checkpoints and several
    processes are as in [`FLMTrainer`]. The logs have the mean divergence of each group of examples: `loss_diagonal`,
    `loss_off_diagonal`, `loss_boundary` and `loss_masked`.

    Args:
        model ([`FMLMModel`], [`FMLMTwoNetworkModel`], `PeftModel` or `str`, *optional*):
            The flow map to train, for example from [`~FMLMModel.from_flm`], or its name or path; with adapters as in
            [`FLMTrainer`]. May be omitted if `model_init` is passed.
        args ([`FMLMTrainingArguments`], *optional*):
            Training arguments; see [`~FMLMTrainingArguments.from_preset`] for the paper's recipes.
        teacher ([`FLMModel`], a flow map, or `str`, *optional*):
            A trained model with the same vocabulary. With `args.self_distillation`, an [`FMLMModel`] learns from the data and
            needs no teacher.
        masked_teacher ([`FLMModel`] or `str`, *optional*):
            A masked diffusion model with the network of an [`FLMModel`], whose last token is the mask. Its predictions for
            masked tokens are the denoiser's at pure noise; they are the targets of a fraction `args.masked_probability` of the
            examples.
        kwargs:
            Further arguments of [`FLMTrainer`].

    Example:

    ```python
    >>> teacher = AutoModel.from_pretrained("path/to/flm")
    >>> trainer = FMLMTrainer(
    ...     model=FMLMModel.from_flm(teacher),
    ...     teacher=teacher,
    ...     args=FMLMTrainingArguments.from_preset("single_stage", output_dir="fmlm"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    model_classes = (FMLMModel, FMLMTwoNetworkModel)
    groups = ("diagonal", "off_diagonal", "boundary", "masked")
    targets = ("semigroup", "lagrangian", "eulerian", "teacher")  # that `args` may choose

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: FMLMTrainingArguments | None = None,
        teacher: PreTrainedModel | str | None = None,
        masked_teacher: FLMModel | str | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            model = load_checked(AutoModel, model, dtype=torch.float32)
        if isinstance(teacher, str):
            teacher = load_checked(AutoModel, teacher)
        if isinstance(masked_teacher, str):
            masked_teacher = load_checked(AutoModel, masked_teacher)
        teacher, masked_teacher = (None if each is None else unwrap_model(each) for each in (teacher, masked_teacher))
        if args is None:
            name = self.model_classes[0].__name__ if model is None else type(unwrap_model(model)).__name__
            args = FMLMTrainingArguments(output_dir=f"{name}-trained")
        if not isinstance(args, FMLMTrainingArguments):
            raise TypeError(f"`args` must be `FMLMTrainingArguments`, got `{type(args).__name__}`.")
        if args.target not in self.targets:
            trainer = "FMLMTrainer" if args.target in FMLMTrainer.targets else "DistributionMatchingTrainer"
            raise ValueError(f"`target={args.target!r}` is for `{trainer}`, not for `{type(self).__name__}`.")
        if (masked_teacher is None) != (args.masked_probability == 0):
            raise ValueError("`masked_teacher` and `masked_probability` go together: pass both or neither.")
        if args.target == "teacher" and not isinstance(teacher, (FMLMModel, FMLMTwoNetworkModel)):
            raise ValueError("`target='teacher'` needs a `teacher` that is itself a flow map, see `FMLMModel`.")
        self.teacher = teacher
        self.masked_teacher = masked_teacher
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled and args.target_network == "ema":
            raise ValueError(
                "`target_network='ema'` runs the averaged network, which FSDP shards: use `target_network='student'`."
            )
        for frozen in (teacher, masked_teacher):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
                self._compile_regions(frozen)
                self._move_model_to_device(frozen, args.device)

    def _check_model(self, model):
        args, teacher, masked_teacher, network = self.args, self.teacher, self.masked_teacher, unwrap_model(model)
        if not isinstance(network, self.model_classes):
            raise TypeError(
                f"`model` must be a flow map, got `{type(network).__name__}`: use `FMLMModel.from_flm(teacher)`."
            )
        super()._check_model(model)
        if teacher is network:
            raise ValueError(
                "`teacher` is frozen and cannot be `model` itself: pass no teacher for self-distillation."
            )
        if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"`teacher` has {teacher.config.vocab_size} tokens, but the model has {model.config.vocab_size}."
            )
        if args.teacher_iterations > 1 and (teacher is None or not teacher.takes_estimate):
            raise ValueError("`teacher_iterations` needs a `teacher` with `self_conditioning`: leave it out.")
        is_taught = teacher is not None or masked_teacher is not None or args.self_distillation
        if not is_taught and not isinstance(network, FMLMTwoNetworkModel):  # a two-network model contains its own flow
            raise ValueError(
                "`teacher` is missing: pass the trained model to distill. To learn from the data instead, use "
                "`FMLMTrainingArguments.from_preset('self_distillation', ...)` or `self_distillation=True`."
            )
        if masked_teacher is not None:
            expected = model.config.vocab_size + 1
            if type(masked_teacher).__name__ != "FLMModel" or masked_teacher.config.vocab_size != expected:
                raise ValueError(
                    f"`masked_teacher` must be an `FLMModel` with {expected} tokens, the model's and the mask, got "
                    f"`{type(masked_teacher).__name__}` with {masked_teacher.config.vocab_size}."
                )
        if isinstance(network, FMLMTwoNetworkModel):
            if masked_teacher is not None:
                raise ValueError(
                    "`masked_teacher` is for an `FMLMModel`: on the diagonal, a two-network model is its flow."
                )
            if args.divergence != "squared_error":
                raise ValueError("A two-network model may leave the simplex: it needs `divergence='squared_error'`.")
            if args.diagonal_fraction > 0:
                raise ValueError(
                    "A two-network model is its frozen flow on the diagonal: it needs `diagonal_fraction=0`."
                )
        elif args.target == "semigroup" and args.diagonal_fraction == 0 and masked_teacher is None:
            logger.warning(
                "With `diagonal_fraction=0`, a model of one network learns nothing from the `teacher` or the data. The preset "
                "'two_network' is for an `FMLMTwoNetworkModel.from_flm(teacher)`."
            )
        if args.target in ("lagrangian", "eulerian") and network.config._attn_implementation != "eager":
            raise ValueError(
                f"`target='{args.target}'` needs forward-mode derivatives, which `{network.config._attn_implementation}` "
                "attention does not support: load the model with `attn_implementation='eager'`."
            )

    @property
    def time_sampler(self) -> TimePairs:
        args = self.args
        return TimePairs(
            args.diagonal_fraction,
            args.boundary_probability,
            args.masked_probability,
            args.time_sampling,
            args.intermediate_time,
            max_tau_t=1 - MIN_DIFFERENCE if args.target == "eulerian" else 1.0,  # its target has a pole at 1
        )

    # Targets

    def _networks(self) -> list[PreTrainedModel]:
        """Returns the distinct networks that read a batch: student, teacher, and the network of the targets."""
        networks = [self.network, self.teacher, self._target_network()]
        return [network for network in dict.fromkeys(networks) if network is not None]

    def _target_network(self) -> PreTrainedModel:
        # In evaluation, model and average have swapped their weights.
        if self.args.target_network == "student" or self.ema.averaged is None or self.ema.is_applied:
            return self.network
        return unwrap_model(self.ema.averaged)

    def compute_targets(self, batch: FlowBatch, joint_noise: JointNoise) -> tuple[Posterior, torch.Tensor]:
        args, autocast, teacher, network = self.args, self.accelerator.autocast, self.teacher, self._target_network()
        with evaluating(*self._networks()):  # no dropout in targets
            # 1. The noised states of the networks of the targets
            time_map = self.network.time_map  # of the batch's times; the teacher's may differ
            noised = (batch.input_ids, batch.tau_s, batch.noise, joint_noise, time_map)
            state = network.make_state(*noised)
            flow = network if teacher is None else teacher
            flow_state = state if teacher is None else teacher.make_state(*noised)
            chunks = network.chunks(state)
            weights, parts = torch.ones_like(batch.tau_s), []
            for group, rows in self._groups(batch):
                part, own_state = batch.select(rows), state[rows]
                seen_state = own_state if flow is network else flow_state[rows]
                # 2. At pure noise: the predictions of a masked model
                if group == "masked":
                    target = masked_posterior(self.masked_teacher, part, autocast)
                # 3. Where the times are equal: the teacher's denoiser, or the data
                elif group == "diagonal" and teacher is None:
                    target = Posterior.of_tokens(part.labels, self.network.config.vocab_size, chunks)
                elif group == "diagonal":
                    times, options = (part.tau_s, part.tau_s), {"num_iterations": args.teacher_iterations}
                    target = posterior_of(flow, seen_state, *times, part, autocast, time_map, **options)
                # 4. Where they differ: an identity of the exact flow map, or the teacher's flow map
                elif args.target == "semigroup":
                    target = semigroup_target(network, own_state, part, autocast)
                elif args.target == "lagrangian":
                    target = lagrangian_target(network, own_state, flow, seen_state, part, autocast)
                elif args.target == "eulerian":
                    target = eulerian_target(network, own_state, flow, seen_state, part, autocast)
                else:
                    target = posterior_of(flow, seen_state, part.tau_s, part.tau_t, part, autocast, time_map)
                    # Weights that make the loss the squared distance of the states that the two maps arrive at
                    s, t = time_map.tau_to_t(part.tau_s), time_map.tau_to_t(part.tau_t)
                    weights[rows] = (1 - remaining_noise(s, t)).square()
                parts.append((rows, target))
            return assemble(parts, len(weights), chunks), weights

    def compute_divergence(self, target, token_weights, hidden_states, batch):
        times = (batch.tau_s, batch.tau_t)
        return self.network.divergence_loss(self.args.divergence, target, token_weights, hidden_states, *times)

    @staticmethod
    def _groups(batch: FlowBatch) -> list[tuple[str, torch.Tensor]]:
        """Returns the row indices of masked, diagonal and off-diagonal examples. Boundary examples count as off-diagonal."""
        groups = {"masked": [], "diagonal": [], "off_diagonal": []}
        for group, rows in batch.groups.items():
            groups[group if group in groups else "off_diagonal"] += rows
        device = batch.tau_s.device
        return [(group, torch.tensor(rows).to(device, non_blocking=True)) for group, rows in groups.items() if rows]

    def training_record(self):
        """As [`FLMTrainer.training_record`], plus the teacher's class and, for a Hub model, its name."""
        record = {**super().training_record(), "teacher": None}
        if self.teacher is not None:
            name = self.teacher.name_or_path
            record["teacher"] = name if is_hub_name(name) else None
            record["teacher_class"] = type(self.teacher).__name__
        return record
