# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Trainer of flow maps: every distillation objective of the paper as a target and a divergence."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from hub.records import is_hub_name
from modeling_flm import FMLMModel, FMLMTwoNetworkModel
from modeling_flm.flow import flow_map, hold, interpolate, project_to_simplex, semigroup_weight
from modeling_flm.losses import one_hot_chunks

from .callbacks import evaluating, through_forward
from .flm_trainer import FLMTrainer
from .fmlm_config import FMLMTrainingArguments


logger = logging.get_logger(__name__)

# A pair of different times is at least this far apart, so that quotients of differences keep their precision.
_MIN_DIFFERENCE = 1e-3


# Which positions there are, and of which the token is given
Masks = tuple[torch.Tensor | None, torch.Tensor | None]

# A two-time denoiser or target, one chunk of positions of shape `(num_rows, num_positions, vocab_size)` at a time
Denoiser = Callable[[slice], torch.Tensor]


class FMLMTrainer(FLMTrainer):
    r"""
    Trains a flow map \\(\delta_{s,t}\\). Each example has two times. Where they are equal (the diagonal) the target is the
    denoiser of the teacher, or without one the data; where they differ it is made of the flow map itself, or of the
    teacher, as `args.target` says. Targets are held constant.

    All networks see the same noise, each through its own embedding. Times, evaluation, averaged weights, checkpoints and
    several processes are as in [`FLMTrainer`]. The logs have the mean divergence of each kind of example apart:
    `loss_diagonal`, `loss_off_diagonal` and `loss_boundary`.

    Args:
        model ([`FMLMModel`], [`FMLMTwoNetworkModel`] or `str`):
            The flow map to train, for example from [`~FMLMModel.from_flm`], or the name or path of one.
        args ([`FMLMTrainingArguments`], *optional*):
            Arguments of the training; see [`~FMLMTrainingArguments.from_preset`] for the paper's.
        teacher ([`FLMModel`], a flow map, or `str`, *optional*):
            A trained model over the same vocabulary. Without one, `model` learns from the data (self-distillation).
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
    num_uniforms = 4

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: FMLMTrainingArguments | None = None,
        teacher: PreTrainedModel | str | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            model = AutoModel.from_pretrained(model, dtype=torch.float32)
        if isinstance(teacher, str):
            teacher = AutoModel.from_pretrained(teacher)
        if not isinstance(model, self.model_classes):
            raise TypeError(
                f"`model` must be a flow map, got `{type(model).__name__}`: use `FMLMModel.from_flm(teacher)`."
            )
        if teacher is model:
            raise ValueError("`teacher` is frozen, and cannot be `model` itself: pass none for self-distillation.")
        if args is None:
            args = FMLMTrainingArguments(output_dir=f"{type(model).__name__}-trained")
        if not isinstance(args, FMLMTrainingArguments):
            raise TypeError(f"`args` must be `FMLMTrainingArguments`, got `{type(args).__name__}`.")
        if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"`teacher` has {teacher.config.vocab_size} tokens, but the model has {model.config.vocab_size}."
            )
        if args.target == "teacher" and not isinstance(teacher, (FMLMModel, FMLMTwoNetworkModel)):
            raise ValueError("`target='teacher'` needs a `teacher` that is itself a flow map.")
        if isinstance(model, FMLMTwoNetworkModel):
            if args.divergence != "squared_error":
                raise ValueError("A two-network model is not a softmax: it needs `divergence='squared_error'`.")
            if args.diagonal_fraction > 0:
                raise ValueError("A two-network model has its flow on the diagonal: it needs `diagonal_fraction=0`.")
        if args.target in ("lagrangian", "eulerian") and model.config._attn_implementation != "eager":
            raise ValueError(
                f"`target='{args.target}'` takes forward-mode derivatives, which `{model.config._attn_implementation}` "
                "attention does not have: load the model with `attn_implementation='eager'`."
            )
        if args.n_gpu > 1:
            raise ValueError(
                "`FMLMTrainer` needs a process for each device: start the script with `accelerate launch`."
            )
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled and args.target_network == "ema":
            raise ValueError(
                "`target_network='ema'` needs the average as a network, which FSDP shards: use 'student'."
            )
        self.teacher = teacher
        if args.prompt_fraction > 0 and teacher is not None:
            marks = [weight for name, weight in teacher.named_parameters() if name.endswith("prompt_mark.weight")]
            if not any(mark.any() for mark in marks):
                logger.warning(
                    "`teacher` was not trained with `prompt_fraction`: what it says of texts that are given in part is a guess."
                )
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self._compile_regions(teacher)
            self._move_model_to_device(teacher, args.device)
        self._components = defaultdict(lambda: torch.zeros(2, device=args.device))

    # Times and noise

    def _draw_times(self, uniforms: torch.Tensor, positions: range) -> dict[str, Any]:
        """Pairs of times and, between them, the intermediate time; and what kind of pair each is."""
        args = self.args
        first, second, third, fourth = uniforms.T
        if args.time_sampling == "uniform_difference":
            difference = _MIN_DIFFERENCE + (1 - _MIN_DIFFERENCE) * first
            start = second * (1 - difference)
            end = start + difference
        else:
            start, end = torch.minimum(first, second), torch.maximum(first, second)
            end = torch.maximum(end, start + _MIN_DIFFERENCE).clamp(max=1.0)
            start = torch.minimum(start, end - _MIN_DIFFERENCE)
        is_boundary = fourth < args.boundary_probability
        start, end = start.masked_fill(is_boundary, 0.0), end.masked_fill(is_boundary, 1.0)
        if args.target == "eulerian":
            end = end.clamp(max=1 - _MIN_DIFFERENCE)  # the target has a pole at 1
        # Diagonal examples are spread evenly over the global batch.
        share = args.diagonal_fraction
        is_diagonal = torch.tensor([int((n + 1) * share) > int(n * share) for n in positions])
        start, end = torch.where(is_diagonal, first, start), torch.where(is_diagonal, first, end)
        fraction = third if args.intermediate_time == "random" else 0.5
        kinds = {"diagonal": is_diagonal, "boundary": is_boundary & ~is_diagonal}
        kinds["off_diagonal"] = ~(kinds["diagonal"] | kinds["boundary"])
        return {
            "timesteps": start,
            "target_timesteps": end,
            "intermediate_timesteps": start + fraction * (end - start),
            # Lists stay on the host: no step waits for the device to learn which rows to take.
            "rows": {kind: mask.nonzero()[:, 0].tolist() for kind, mask in kinds.items()},
        }

    def _networks(self) -> list[PreTrainedModel]:
        """The networks that see a batch: the student, then the teacher, then the network in the targets, if others."""
        networks = [self.model, self.teacher, self._target_network()]
        return [network for network in dict.fromkeys(networks) if network is not None]

    def _target_network(self) -> PreTrainedModel:
        # In evaluation the model itself has the averaged weights, and the average those of the training.
        if self.args.target_network == "student" or self.ema.averaged is None or self.ema.is_applied:
            return self.model
        return self.ema.averaged.module

    def _states(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The noised state of each of the networks, for the targets, in float32 whatever the networks are in."""
        joint_noise, states, index = self._get_joint_noise(), [], 0
        for network in self._networks():
            factors = [joint_noise.factor(index + n) for n in range(len(network.embeddings))]
            index += len(factors)
            clean = torch.cat([embedding(inputs["input_ids"]) for embedding in network.embeddings], dim=-1)
            clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
            noise = inputs["noise"] @ torch.cat(factors, dim=1).to(inputs["noise"])
            states.append(hold(interpolate(noise, clean, inputs["t"]), clean, inputs.get("known_mask")))
        return states

    # Targets

    def _denoiser(self, network: PreTrainedModel, state: torch.Tensor, tau_s, tau_t, masks: Masks) -> Denoiser:
        # Blocks run in the precision of the training; states and their updates stay in float32.
        with self.accelerator.autocast():
            hidden_states = network.encode(state, tau_s, tau_t, *masks)
        return lambda chunk: self._delta(network, hidden_states[:, chunk], tau_s, tau_t)

    def _delta(self, network: PreTrainedModel, hidden_states: torch.Tensor, tau_s, tau_t) -> torch.Tensor:
        with self.accelerator.autocast():
            return network.delta(network.predict(hidden_states, tau_s, tau_t))

    def _denoiser_and_derivative(
        self,
        network: PreTrainedModel,
        primals: tuple[torch.Tensor, ...],
        tangents: tuple[torch.Tensor, ...],
        masks: Masks,
    ) -> tuple[Denoiser, Denoiser]:
        """A two-time denoiser at `primals`, which are (state, tau_s, tau_t), and its derivative along `tangents`."""
        times = primals[1:]
        # Forward-mode derivatives do not go through what is compiled.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            hidden_states, change = torch.func.jvp(
                lambda state, tau_s, tau_t: network.encode(state, tau_s, tau_t, *masks), primals, tangents
            )

        def derivative(chunk: slice) -> torch.Tensor:
            here, along = (hidden_states[:, chunk], *times), (change[:, chunk], *tangents[1:])
            return torch.func.jvp(lambda *arguments: self._delta(network, *arguments), here, along)[1]

        return lambda chunk: self._delta(network, hidden_states[:, chunk], *times), derivative

    def _expectation(self, denoiser: Denoiser, network: PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
        """The expected embedding of the clean tokens, which the state of `network` moves towards."""
        embedding = network.state_embedding.to(state)
        return torch.cat([denoiser(chunk) @ embedding for chunk in network.chunks(state)], dim=1)

    def _diagonal_target(self, teacher_state, tau_s, masks: Masks, labels) -> Denoiser:
        """The denoiser of the teacher, or the data."""
        if self.teacher is None:
            return one_hot_chunks(labels, self.model.config.vocab_size)
        return self._denoiser(self.teacher, teacher_state, tau_s, tau_s, masks)

    def _semigroup_target(self, state, tau_s, tau_u, tau_t, masks: Masks) -> Denoiser:
        r"""\\(\lambda\,\delta_{s,u}(x) + (1 - \lambda)\,\delta_{u,t}(X_{s,u}(x))\\)"""
        network = self._target_network()
        s, u, t = (self.time_map.tau_to_t(tau) for tau in (tau_s, tau_u, tau_t))
        first = self._denoiser(network, state, tau_s, tau_u, masks)
        intermediate = flow_map(state, self._expectation(first, network, state), s, u)
        intermediate = hold(intermediate, state, masks[1])  # what is given stays as it is
        second = self._denoiser(network, intermediate, tau_u, tau_t, masks)
        weight = semigroup_weight(s, u, t)[:, None, None]
        return lambda chunk: torch.lerp(second(chunk), first(chunk), weight)

    def _lagrangian_target(self, state, teacher_state, tau_s, tau_t, masks: Masks) -> Denoiser:
        r"""\\(D_t(X_{s,t}(x)) - \frac{(1-t)(t-s)}{1-s}\,\partial_t \delta_{s,t}(x)\\), projected to the simplex"""
        network = self._target_network()
        s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
        tangents = (torch.zeros_like(state), torch.zeros_like(tau_s), self.time_map.dtau_dt(t))
        delta, derivative = self._denoiser_and_derivative(network, (state, tau_s, tau_t), tangents, masks)
        flow, flow_state = (network, state) if self.teacher is None else (self.teacher, teacher_state)
        arrived = flow_map(flow_state, self._expectation(delta, flow, flow_state), s, t)
        arrived = hold(arrived, flow_state, masks[1])
        denoised = self._denoiser(flow, arrived, tau_t, tau_t, masks)
        factor = ((1 - t) * (t - s) / (1 - s))[:, None, None]
        return lambda chunk: project_to_simplex(denoised(chunk) - factor * derivative(chunk))

    def _eulerian_target(self, state, teacher_state, tau_s, tau_t, masks: Masks) -> Denoiser:
        r"""\\(D_s(x) + \frac{t-s}{1-t}\left((1-s)\,\partial_s \delta_{s,t}(x) + (D_s(x) - x) \cdot \nabla_x \delta_{s,t}(x)\right)\\)"""
        network = self._target_network()
        s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
        flow, flow_state = (network, state) if self.teacher is None else (self.teacher, teacher_state)
        denoised = self._denoiser(flow, flow_state, tau_s, tau_s, masks)
        change = self._expectation(denoised, network, state) - state
        change = hold(change, torch.zeros_like(change), masks[1])
        tangents = (change, (1 - s) * self.time_map.dtau_dt(s), torch.zeros_like(tau_t))
        _, derivative = self._denoiser_and_derivative(network, (state, tau_s, tau_t), tangents, masks)
        factor = ((t - s) / (1 - t))[:, None, None]
        return lambda chunk: denoised(chunk) + factor * derivative(chunk)

    @torch.no_grad()
    def compute_targets(self, inputs: dict[str, Any]) -> tuple[Denoiser, torch.Tensor]:
        r"""
        The targets of a batch.

        Args:
            inputs (`dict[str, Any]`):
                A batch with `input_ids`, `labels`, `noise`, `t`, `timesteps`, `target_timesteps`,
                `intermediate_timesteps`, `rows` and, where there is padding or a prompt, `attention_mask` and `known_mask`.

        Returns:
            `tuple[Callable[[slice], torch.Tensor], torch.Tensor]`: a function from a chunk of positions to the targets
            there, of shape `(batch_size, num_positions, vocab_size)`, and a weight for each example, of shape
            `(batch_size,)`.
        """
        states = dict(zip(self._networks(), self._states(inputs)))
        target_state, teacher_state = states[self._target_network()], states.get(self.teacher)
        weights = torch.ones_like(inputs["timesteps"])
        groups = []
        for rows, is_diagonal in self._groups(inputs):
            take = lambda x: None if x is None else x[rows]  # noqa: E731, B023
            tau_s, tau_u, tau_t = (
                take(inputs[name]) for name in ("timesteps", "intermediate_timesteps", "target_timesteps")
            )
            state, from_teacher = take(target_state), take(teacher_state)
            masks = (take(inputs.get("attention_mask")), take(inputs.get("known_mask")))
            if is_diagonal:
                target = self._diagonal_target(from_teacher, tau_s, masks, take(inputs["labels"]))
            elif self.args.target == "semigroup":
                target = self._semigroup_target(state, tau_s, tau_u, tau_t, masks)
            elif self.args.target == "lagrangian":
                target = self._lagrangian_target(state, from_teacher, tau_s, tau_t, masks)
            elif self.args.target == "eulerian":
                target = self._eulerian_target(state, from_teacher, tau_s, tau_t, masks)
            else:
                target = self._denoiser(self.teacher, from_teacher, tau_s, tau_t, masks)
                # The squared distance of the states that the two maps arrive at
                s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
                weights[rows] = ((t - s) / (1 - s)).square()
            groups.append((rows, target))
        return lambda chunk: self._assemble(groups, len(weights), chunk), weights

    @staticmethod
    def _groups(inputs: dict[str, Any]) -> list[tuple[torch.Tensor, bool]]:
        """The rows that are on the diagonal, and then those that are not."""
        device = inputs["timesteps"].device
        diagonal = inputs["rows"].get("diagonal", [])
        others = [row for kind, rows in inputs["rows"].items() if kind != "diagonal" for row in rows]
        groups = ((diagonal, True), (others, False))
        return [(torch.tensor(rows).to(device, non_blocking=True), kind) for rows, kind in groups if rows]

    @staticmethod
    def _assemble(groups: list[tuple[torch.Tensor, Denoiser]], batch_size: int, chunk: slice) -> torch.Tensor:
        targets = None
        for rows, target in groups:
            values = target(chunk)
            targets = values.new_empty(batch_size, *values.shape[1:]) if targets is None else targets
            targets[rows] = values
        return targets

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with evaluating(*self._networks()):
            targets, weights = through_forward(self.model, lambda: self.compute_targets(inputs))
        names = ("input_ids", "labels", "timesteps", "target_timesteps", "noise", "t")
        names += ("attention_mask", "known_mask", "skip_logits")
        batch = {name: inputs[name] for name in names if name in inputs}
        batch |= {"targets": targets, "divergence": self.args.divergence, "token_weights": weights}
        batch["joint_noise"] = self._get_joint_noise()
        loss, output = super().compute_loss(model, batch, True, num_items_in_batch)
        mask = inputs["labels"] != -100
        for kind, rows in inputs["rows"].items():
            rows = torch.tensor(rows, dtype=torch.long).to(mask.device, non_blocking=True)
            self._components[kind] += torch.stack([output.token_losses[rows].sum(), mask[rows].sum()])
        return (loss, output) if return_outputs else loss

    def _pop_components(self, prefix: str) -> dict[str, float]:
        """The mean divergence of each kind of example since the last call, over all processes."""
        kinds = ("diagonal", "off_diagonal", "boundary")
        totals = self.accelerator.reduce(torch.stack([self._components[kind] for kind in kinds]), "sum").tolist()
        self._components.clear()
        return {f"{prefix}loss_{kind}": total / count for kind, (total, count) in zip(kinds, totals) if count > 0}

    def _training_record(self) -> dict[str, Any]:
        # A teacher on this machine has no name for others.
        name = None if self.teacher is None else self.teacher.name_or_path
        return {**super()._training_record(), "teacher": name if is_hub_name(name) else None}

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs.update(self._pop_components(""))
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        training = self._components.copy()
        self._components.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._pop_components(f"{metric_key_prefix}_"))
        self._components.update(training)
        return output
