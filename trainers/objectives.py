# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Targets of a two-time denoiser. Each is the right-hand side of an identity of the exact flow map. Targets are detached
posteriors, computed one chunk of positions at a time when the loss reads them.

Networks run within the context `autocast`, in the precision of the training. States and their updates stay in float32.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor

from modeling_flm.flow import (
    denoising_direction,
    eulerian_coefficient,
    expand_times,
    flow_map,
    lagrangian_coefficient,
    semigroup_weight,
)
from modeling_flm.posterior_flm import Posterior, times_of
from modeling_flm.time_reparameterization import TimeMap, translate_tau

from .batches import FlowBatch


Autocast = Callable[[], AbstractContextManager]


def posterior_of(
    network: PreTrainedModel,
    state: torch.Tensor,
    tau_s: torch.Tensor,
    tau_t: torch.Tensor,
    batch: FlowBatch,
    autocast: Autocast,
    time_map: TimeMap | None = None,
    logits_processor: LogitsProcessorList | None = None,
    num_iterations: int = 1,
) -> Posterior:
    r"""
    Returns the two-time denoiser \\(\delta_{s,t}(x)\\) of a network.

    Args:
        network ([`~transformers.PreTrainedModel`]): The network.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): Its state at `tau_s`.
        tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): Reparameterized times of the states.
        tau_t (`torch.Tensor` of the shape of `tau_s`): Target times.
        batch ([`FlowBatch`]): The attention mask.
        autocast (`Callable[[], AbstractContextManager]`): Precision that networks run in.
        time_map ([`ReparameterizedTime`] or [`IdentityTime`], *optional*):
            The reparameterization of `tau_s` and `tau_t`. By default the network's own.
        logits_processor ([`~transformers.LogitsProcessorList`], *optional*): Changes the logits.
        num_iterations (`int`, *optional*, defaults to 1):
            Forward passes of a network with self-conditioning, each with the estimate of the one before.
    """
    if time_map is not None:
        tau_s, tau_t = (translate_tau(tau, time_map, network.time_map) for tau in (tau_s, tau_t))
    with autocast():
        inputs = (state, tau_s, tau_t, batch.attention_mask, logits_processor)
        posterior = network.posterior(*inputs).within(autocast)
        for _ in range(num_iterations - 1):
            estimate = expected_embedding(posterior, network, state)
            posterior = network.posterior(*inputs, estimate).within(autocast)
        return posterior


def masked_posterior(network: PreTrainedModel, batch: FlowBatch, autocast: Autocast) -> Posterior:
    r"""
    Returns the predictions of a masked diffusion model for masked tokens, without the mask token. They equal the denoiser
    \\(D_0\\), since pure noise carries no information either.

    Args:
        network ([`~transformers.PreTrainedModel`]): The masked model, run at time 0. Its last token is the mask.
        batch ([`FlowBatch`]): Examples at time 0, except for known tokens.
        autocast (`Callable[[], AbstractContextManager]`): Precision that networks run in.
    """
    mask_token = network.config.vocab_size - 1
    state = network.make_state(torch.where(batch.known, batch.input_ids, mask_token))
    start = torch.zeros(len(state), device=state.device)
    no_mask = LogitsProcessorList([SuppressTokensLogitsProcessor([mask_token], device=state.device)])
    posterior = posterior_of(network, state, start, start, batch, autocast, logits_processor=no_mask)
    return posterior.map(lambda probabilities, chunk: probabilities[..., :mask_token])


def derivative(
    network: PreTrainedModel,
    primals: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    batch: FlowBatch,
    autocast: Autocast,
) -> tuple[Posterior, Posterior]:
    """Returns the two-time denoiser at `primals`, (state, tau_s, tau_t), and its derivative along `tangents`."""
    mask, chunks, device = batch.attention_mask, network.chunks(primals[0]), primals[0].device
    # Compiled regions have no forward-mode derivatives.
    with autocast(), torch.compiler.set_stance("force_eager"):
        hidden_states, change = torch.func.jvp(lambda *each: network.encode(*each, mask), primals, tangents)

    def inputs(chunk: slice) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        times = ([times_of(tau, chunk) for tau in each[1:]] for each in (primals, tangents))
        here, along = ((tensor[:, chunk], *each) for tensor, each in zip((hidden_states, change), times))
        return here, along

    values = Posterior(lambda chunk: network.predict(*inputs(chunk)[0]), chunks, device)
    changes = Posterior(lambda chunk: torch.func.jvp(network.predict, *inputs(chunk))[1], chunks, device)
    return values.within(autocast), changes.within(autocast)


def expected_embedding(posterior: Posterior, network: PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
    """Returns the expected embedding of the clean tokens, in the space of the states of `network`."""
    return posterior.mean(network.state_embedding.to(state))


def semigroup_target(network: PreTrainedModel, state: torch.Tensor, batch: FlowBatch, autocast: Autocast) -> Posterior:
    r"""
    The composition of two shorter maps, \\(\lambda\,\delta_{s,u}(x) + (1 - \lambda)\,\delta_{u,t}(X_{s,u}(x))\\).

    Args:
        network ([`~transformers.PreTrainedModel`]): The flow map.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): Its state at `batch.tau_s`.
        batch ([`FlowBatch`]): Times and attention mask.
        autocast (`Callable[[], AbstractContextManager]`): Precision that networks run in.
    """
    s, u, t = (network.time_map.tau_to_t(tau) for tau in (batch.tau_s, batch.tau_u, batch.tau_t))
    first = posterior_of(network, state, batch.tau_s, batch.tau_u, batch, autocast)
    arrived = flow_map(state, expected_embedding(first, network, state), s, u)
    second = posterior_of(network, arrived, batch.tau_u, batch.tau_t, batch, autocast)
    weight = semigroup_weight(s, u, t)
    return second.combine(first, lambda start, end, chunk: torch.lerp(start, end, chunk_of(weight, chunk, start)))


def lagrangian_target(
    network: PreTrainedModel,
    state: torch.Tensor,
    flow: PreTrainedModel,
    flow_state: torch.Tensor,
    batch: FlowBatch,
    autocast: Autocast,
) -> Posterior:
    r"""
    The derivative of the map in its target time, \\(D_t(X_{s,t}(x)) - \frac{(1-t)(t-s)}{1-s}\,\partial_t \delta_{s,t}(x)\\), projected
    to the simplex. `flow` is the network of \\(D\\), and `flow_state` its state. Other arguments as for [`semigroup_target`].
    """
    tau_s, tau_t, time_map = batch.tau_s, batch.tau_t, network.time_map
    s, t = time_map.tau_to_t(tau_s), time_map.tau_to_t(tau_t)
    tangents = (torch.zeros_like(state), torch.zeros_like(tau_s), time_map.dtau_dt(t))
    delta, change = derivative(network, (state, tau_s, tau_t), tangents, batch, autocast)
    arrived = flow_map(flow_state, expected_embedding(delta, flow, flow_state), s, t)
    denoised = posterior_of(flow, arrived, tau_t, tau_t, batch, autocast, time_map)
    factor = lagrangian_coefficient(s, t)

    def target(denoised: torch.Tensor, change: torch.Tensor, chunk: slice) -> torch.Tensor:
        return project_to_simplex(denoised - chunk_of(factor, chunk, change) * change)

    return denoised.combine(change, target)


def eulerian_target(
    network: PreTrainedModel,
    state: torch.Tensor,
    flow: PreTrainedModel,
    flow_state: torch.Tensor,
    batch: FlowBatch,
    autocast: Autocast,
) -> Posterior:
    r"""
    The derivative of the map along the flow,
    \\(D_s(x) + \frac{t-s}{1-t}\left((1-s)\,\partial_s \delta_{s,t}(x) + (D_s(x) - x) \cdot \nabla_x \delta_{s,t}(x)\right)\\).
    Arguments are as for [`lagrangian_target`].
    """
    tau_s, tau_t, time_map = batch.tau_s, batch.tau_t, network.time_map
    s, t = time_map.tau_to_t(tau_s), time_map.tau_to_t(tau_t)
    denoised = posterior_of(flow, flow_state, tau_s, tau_s, batch, autocast, time_map)
    along_flow = denoising_direction(state, expected_embedding(denoised, network, state), s)
    tangents = (along_flow, (1 - s) * time_map.dtau_dt(s), torch.zeros_like(tau_t))
    _, change = derivative(network, (state, tau_s, tau_t), tangents, batch, autocast)
    factor = eulerian_coefficient(s, t)
    return denoised.combine(change, lambda start, along, chunk: start + chunk_of(factor, chunk, along) * along)


def chunk_of(factor: torch.Tensor, chunk: slice, values: torch.Tensor) -> torch.Tensor:
    """Returns a factor of sequences or tokens in a shape that broadcasts over the values of a chunk of positions."""
    return expand_times(times_of(factor, chunk), values)


def assemble(parts: list[tuple[torch.LongTensor, Posterior]], batch_size: int, chunks: list[slice]) -> Posterior:
    """
    Combines the targets of parts of a batch.

    Args:
        parts (`list[tuple[torch.LongTensor, Posterior]]`): Rows of each part, and its targets.
        batch_size (`int`): Number of rows of the batch.
        chunks (`list[slice]`): Chunks of positions to read.
    """

    def assembled_probabilities(chunk: slice) -> torch.Tensor:
        targets = None
        for rows, part in parts:
            values = part.probabilities(chunk)
            targets = values.new_empty(batch_size, *values.shape[1:]) if targets is None else targets
            targets[rows] = values
        return targets

    return Posterior(assembled_probabilities, chunks, parts[0][1].device)


def project_to_simplex(x: torch.Tensor) -> torch.Tensor:
    """
    Projects to the nearest point of the probability simplex (sparsemax).

    Args:
        x (`torch.Tensor` of shape `(..., vocab_size)`): Any values.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: nonnegative values that sum to 1.
    """
    ordered = x.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)  # NaNs would give 0
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0)
