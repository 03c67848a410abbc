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
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel, PreTrainedModel

from hub.card import is_hub_name
from modeling_flm import FMLMModel, FMLMTwoNetworkModel
from modeling_flm.flow import flow_map, interpolate, noise_factors, project_to_simplex, semigroup_weight

from .callbacks import as_forward, evaluating
from .flm_trainer import FLMTrainer
from .fmlm_config import FMLMTrainingArguments


# A pair of different times is at least this far apart, so that quotients of differences keep their precision.
_MIN_DIFFERENCE = 1e-3


def divergence(kind: str, target: torch.Tensor, delta: torch.Tensor, log_delta: torch.Tensor | None) -> torch.Tensor:
    """
    The divergence of a two-time denoiser from its target.

    Args:
        kind (`str`): `"cross_entropy"`, `"kl"` or `"squared_error"`.
        target (`torch.Tensor` of shape `(..., vocab_size)`): The target.
        delta (`torch.Tensor` of shape `(..., vocab_size)`): The two-time denoiser.
        log_delta (`torch.Tensor` of shape `(..., vocab_size)`, *optional*): Its logarithm. Not for `"squared_error"`.

    Returns:
        `torch.Tensor` of shape `(...)`: per token.
    """
    if kind == "squared_error":
        return (target - delta).square().sum(dim=-1)
    losses = -(target * log_delta).sum(dim=-1)
    return losses if kind == "cross_entropy" else losses + torch.xlogy(target, target).sum(dim=-1)


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
        if teacher is not None:
            teacher.requires_grad_(False).eval()
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

    def _noised_embeddings(self):
        return [embedding.weight.detach() for network in self._networks() for embedding in network.embeddings]

    def _states(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """The noised state of each of the networks, for the targets."""
        networks = self._networks()
        weights = [network.embed_vocabulary(embedding) for network in networks for embedding in network.embeddings]
        factors = iter(noise_factors(*weights))
        states = []
        for network in networks:
            factor = torch.cat([next(factors) for _ in network.embeddings], dim=1)
            clean = torch.cat([embedding(inputs["input_ids"]) for embedding in network.embeddings], dim=-1)
            states.append(interpolate(inputs["noise"] @ factor.to(inputs["noise"]), clean, inputs["t"]))
        return states

    # Targets

    def _delta(self, network: PreTrainedModel, state: torch.Tensor, tau_s, tau_t, attention_mask) -> torch.Tensor:
        # Blocks run in the precision of the training; states and their updates stay in float32.
        with self.accelerator.autocast():
            return torch.cat(list(network.denoise(state, tau_s, tau_t, attention_mask)), dim=1)

    def _diagonal_target(self, teacher_state, tau_s, attention_mask, labels) -> torch.Tensor:
        """The denoiser of the teacher, or the data."""
        if self.teacher is None:
            return F.one_hot(labels.clamp(min=0), self.model.config.vocab_size).float()
        return self._delta(self.teacher, teacher_state, tau_s, tau_s, attention_mask)

    def _semigroup_target(self, state, tau_s, tau_u, tau_t, attention_mask) -> torch.Tensor:
        r"""\\(\lambda\,\delta_{s,u}(x) + (1 - \lambda)\,\delta_{u,t}(X_{s,u}(x))\\)"""
        network = self._target_network()
        s, u, t = (self.time.tau_to_t(tau) for tau in (tau_s, tau_u, tau_t))
        first = self._delta(network, state, tau_s, tau_u, attention_mask)
        intermediate = flow_map(state, first @ network.state_embedding.to(first), s, u)
        second = self._delta(network, intermediate, tau_u, tau_t, attention_mask)
        weight = semigroup_weight(s, u, t)[:, None, None]
        return weight * first + (1 - weight) * second

    def _lagrangian_target(self, state, teacher_state, tau_s, tau_t, attention_mask) -> torch.Tensor:
        r"""\\(D_t(X_{s,t}(x)) - \frac{(1-t)(t-s)}{1-s}\,\partial_t \delta_{s,t}(x)\\)"""
        network = self._target_network()
        s, t = self.time.tau_to_t(tau_s), self.time.tau_to_t(tau_t)
        delta, derivative = torch.func.jvp(
            lambda tau: self._delta(network, state, tau_s, tau, attention_mask), (tau_t,), (self.time.dtau_dt(t),)
        )
        flow, flow_state = (network, state) if self.teacher is None else (self.teacher, teacher_state)
        arrived = flow_map(flow_state, delta @ flow.state_embedding.to(delta), s, t)
        denoised = self._delta(flow, arrived, tau_t, tau_t, attention_mask)
        return denoised - ((1 - t) * (t - s) / (1 - s))[:, None, None] * derivative

    def _eulerian_target(self, state, teacher_state, tau_s, tau_t, attention_mask) -> torch.Tensor:
        r"""\\(D_s(x) + \frac{t-s}{1-t}\left((1-s)\,\partial_s \delta_{s,t}(x) + (D_s(x) - x) \cdot \nabla_x \delta_{s,t}(x)\right)\\)"""
        network = self._target_network()
        s, t = self.time.tau_to_t(tau_s), self.time.tau_to_t(tau_t)
        flow, flow_state = (network, state) if self.teacher is None else (self.teacher, teacher_state)
        denoised = self._delta(flow, flow_state, tau_s, tau_s, attention_mask)
        _, derivative = torch.func.jvp(
            lambda x, tau: self._delta(network, x, tau, tau_t, attention_mask),
            (state, tau_s),
            (denoised @ network.state_embedding.to(denoised) - state, (1 - s) * self.time.dtau_dt(s)),
        )
        return denoised + ((t - s) / (1 - t))[:, None, None] * derivative

    @torch.no_grad()
    def compute_targets(self, inputs: dict[str, Any]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        r"""
        The targets of a batch.

        Args:
            inputs (`dict[str, Any]`):
                A batch with `input_ids`, `labels`, `noise`, `t`, `timesteps`, `target_timesteps`,
                `intermediate_timesteps`, `rows` and, where there is padding, `attention_mask`.

        Yields:
            For the examples on the diagonal, and then for those off it, their rows, their targets of shape
            `(num_rows, sequence_length, vocab_size)`, and a weight for each row of shape `(num_rows,)`.
        """
        states = dict(zip(self._networks(), self._states(inputs)))
        target_state, teacher_state = states[self._target_network()], states.get(self.teacher)
        mask = inputs.get("attention_mask")
        diagonal = inputs["rows"].get("diagonal", [])
        others = [row for kind, rows in inputs["rows"].items() if kind != "diagonal" for row in rows]
        for rows in (diagonal, others):
            if not rows:
                continue
            take = lambda x: None if x is None else x[rows]  # noqa: E731, B023
            tau_s, tau_u, tau_t = (
                take(inputs[name]) for name in ("timesteps", "intermediate_timesteps", "target_timesteps")
            )
            state, from_teacher, attention_mask = take(target_state), take(teacher_state), take(mask)
            weight = torch.ones_like(tau_s)
            if rows is diagonal:
                target = self._diagonal_target(from_teacher, tau_s, attention_mask, take(inputs["labels"]))
            elif self.args.target == "semigroup":
                target = self._semigroup_target(state, tau_s, tau_u, tau_t, attention_mask)
            elif self.args.target == "lagrangian":
                target = self._lagrangian_target(state, from_teacher, tau_s, tau_t, attention_mask)
                target = project_to_simplex(target)
            elif self.args.target == "eulerian":
                target = self._eulerian_target(state, from_teacher, tau_s, tau_t, attention_mask)
            else:
                target = self._delta(self.teacher, from_teacher, tau_s, tau_t, attention_mask)
                # The squared distance of the states that the two maps arrive at
                s, t = self.time.tau_to_t(tau_s), self.time.tau_to_t(tau_t)
                weight = ((t - s) / (1 - s)).square()
            yield rows, target, weight

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with evaluating(*self._networks()):
            targets = as_forward(self.model, lambda: list(self.compute_targets(inputs)))
        names = ("input_ids", "timesteps", "target_timesteps", "noise", "t", "attention_mask")
        own = len(self.model.embeddings)
        output = model(
            **{name: inputs[name] for name in names if name in inputs},
            companion_embeddings=self._noised_embeddings()[own:],
        )
        is_softmax = self.args.divergence != "squared_error"
        losses = torch.zeros(inputs["input_ids"].shape, device=output.logits.device)
        mask = inputs["labels"] != -100
        for rows, target, weight in targets:
            logits = output.logits[rows]
            log_delta = self.model.log_delta(logits) if is_softmax else None
            delta = None if is_softmax else self.model.delta(logits)
            values = weight[:, None] * divergence(self.args.divergence, target, delta, log_delta)
            losses = losses.index_put((torch.tensor(rows, device=losses.device),), values)
        for kind, rows in inputs["rows"].items():
            counted = mask[rows]
            self._components[kind] += torch.stack([(losses.detach()[rows] * counted).sum(), counted.sum()])
        if output.log_weight is not None and model.training:
            losses = torch.exp(-output.log_weight)[:, None] * losses + output.log_weight[:, None]

        loss = (losses * mask).sum()
        if not model.training or num_items_in_batch is None:
            loss = loss / mask.sum().clamp(min=1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # the count is over all processes, which are averaged
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
