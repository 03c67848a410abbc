# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
The targets of a two-time denoiser, each the right side of an identity that the exact one obeys. They are posteriors, held
constant, and a chunk of them is made when the loss reads it.

Networks run within the context `autocast`, in the precision of the training; states and their updates stay in float32.
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
) -> Posterior:
    r"""
    The two-time denoiser \\(\delta_{s,t}(x)\\) of a network at a state, of shape
    `(batch_size, sequence_length, embedding_size)`. Times are in the reparameterization of `time_map`, by default the network's.
    """
    if time_map is not None:
        tau_s, tau_t = (translate_tau(tau, time_map, network.time_map) for tau in (tau_s, tau_t))
    with autocast():
        return network.posterior(state, tau_s, tau_t, batch.attention_mask, logits_processor).within(autocast)


def masked_posterior(network: PreTrainedModel, batch: FlowBatch, autocast: Autocast) -> Posterior:
    r"""
    What a masked diffusion model says of the tokens that are not known, of all tokens but the mask: this is the denoiser
    \\(D_0\\), as pure noise says nothing either.

    Args:
        network ([`~transformers.PreTrainedModel`]): The masked model, whose last token is the mask, and which is run at the time 0.
        batch ([`FlowBatch`]): Texts at the time 0 but for known tokens.
        autocast (`Callable[[], AbstractContextManager]`): The precision that networks run in.
    """
    mask_token = network.config.vocab_size - 1
    known = (batch.tau_s if batch.tau_s.dim() == 2 else batch.tau_s[:, None]) == 1
    state = network.make_state(torch.where(known, batch.input_ids, mask_token))
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
    """The two-time denoiser at `primals`, which are (state, tau_s, tau_t), and its derivative along `tangents`."""
    mask, chunks, device = batch.attention_mask, network.chunks(primals[0]), primals[0].device
    # Forward-mode derivatives do not go through what is compiled.
    with autocast(), torch.compiler.set_stance("force_eager"):
        hidden_states, change = torch.func.jvp(lambda *each: network.encode(*each, mask), primals, tangents)

    def inputs(chunk: slice) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        times = ([times_of(tau, chunk) for tau in each[1:]] for each in (primals, tangents))
        here, along = ((tensor[:, chunk], *each) for tensor, each in zip((hidden_states, change), times))
        return here, along

    values = Posterior(lambda chunk: network.predict(*inputs(chunk)[0]), chunks, device)
    changes = Posterior(lambda chunk: torch.func.jvp(network.predict, *inputs(chunk))[1], chunks, device)
    return values.within(autocast), changes.within(autocast)


def mean_state(posterior: Posterior, network: PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
    """The expected embedding of the clean tokens, which the state of `network` moves towards."""
    return posterior.mean(network.state_embedding.to(state))


def semigroup_target(network: PreTrainedModel, state: torch.Tensor, batch: FlowBatch, autocast: Autocast) -> Posterior:
    r"""
    Two shorter maps, \\(\lambda\,\delta_{s,u}(x) + (1 - \lambda)\,\delta_{u,t}(X_{s,u}(x))\\).

    Args:
        network ([`~transformers.PreTrainedModel`]): The flow map.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): Its state at `batch.tau_s`.
        batch ([`FlowBatch`]): The times and the mask.
        autocast (`Callable[[], AbstractContextManager]`): The precision that networks run in.
    """
    s, u, t = (network.time_map.tau_to_t(tau) for tau in (batch.tau_s, batch.tau_u, batch.tau_t))
    first = posterior_of(network, state, batch.tau_s, batch.tau_u, batch, autocast)
    arrived = flow_map(state, mean_state(first, network, state), s, u)
    second = posterior_of(network, arrived, batch.tau_u, batch.tau_t, batch, autocast)
    weight = semigroup_weight(s, u, t)
    return second.combine(first, lambda start, end, chunk: torch.lerp(start, end, _of_chunk(weight, chunk, start)))


def lagrangian_target(
    network: PreTrainedModel,
    state: torch.Tensor,
    flow: PreTrainedModel,
    flow_state: torch.Tensor,
    batch: FlowBatch,
    autocast: Autocast,
) -> Posterior:
    r"""
    The derivative in the time to arrive at, \\(D_t(X_{s,t}(x)) - \frac{(1-t)(t-s)}{1-s}\,\partial_t \delta_{s,t}(x)\\), projected
    to the simplex. `flow` is the network of \\(D\\), and `flow_state` its state; otherwise as [`semigroup_target`].
    """
    tau_s, tau_t, time_map = batch.tau_s, batch.tau_t, network.time_map
    s, t = time_map.tau_to_t(tau_s), time_map.tau_to_t(tau_t)
    tangents = (torch.zeros_like(state), torch.zeros_like(tau_s), time_map.dtau_dt(t))
    delta, change = derivative(network, (state, tau_s, tau_t), tangents, batch, autocast)
    arrived = flow_map(flow_state, mean_state(delta, flow, flow_state), s, t)
    denoised = posterior_of(flow, arrived, tau_t, tau_t, batch, autocast, time_map)
    factor = lagrangian_coefficient(s, t)

    def target(denoised: torch.Tensor, change: torch.Tensor, chunk: slice) -> torch.Tensor:
        return project_to_simplex(denoised - _of_chunk(factor, chunk, change) * change)

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
    The derivative along the flow,
    \\(D_s(x) + \frac{t-s}{1-t}\left((1-s)\,\partial_s \delta_{s,t}(x) + (D_s(x) - x) \cdot \nabla_x \delta_{s,t}(x)\right)\\).
    Arguments are as for [`lagrangian_target`].
    """
    tau_s, tau_t, time_map = batch.tau_s, batch.tau_t, network.time_map
    s, t = time_map.tau_to_t(tau_s), time_map.tau_to_t(tau_t)
    denoised = posterior_of(flow, flow_state, tau_s, tau_s, batch, autocast, time_map)
    along_flow = denoising_direction(state, mean_state(denoised, network, state), s)
    tangents = (along_flow, (1 - s) * time_map.dtau_dt(s), torch.zeros_like(tau_t))
    _, change = derivative(network, (state, tau_s, tau_t), tangents, batch, autocast)
    factor = eulerian_coefficient(s, t)
    return denoised.combine(change, lambda start, along, chunk: start + _of_chunk(factor, chunk, along) * along)


def _of_chunk(factor: torch.Tensor, chunk: slice, values: torch.Tensor) -> torch.Tensor:
    """A factor of texts or tokens, for the values of a chunk of positions."""
    return expand_times(times_of(factor, chunk), values)


def assemble(parts: list[tuple[torch.LongTensor, Posterior]], batch_size: int, chunks: list[slice]) -> Posterior:
    """
    The targets of a batch from those of its parts.

    Args:
        parts (`list[tuple[torch.LongTensor, Posterior]]`): Rows of the batch, and what is said of them.
        batch_size (`int`): The number of rows.
        chunks (`list[slice]`): The positions that are read at a time.
    """

    def probabilities(chunk: slice) -> torch.Tensor:
        targets = None
        for rows, part in parts:
            values = part.probabilities(chunk)
            targets = values.new_empty(batch_size, *values.shape[1:]) if targets is None else targets
            targets[rows] = values
        return targets

    return Posterior(probabilities, chunks, parts[0][1].device)


def project_to_simplex(x: torch.Tensor) -> torch.Tensor:
    """
    The nearest point of the probability simplex (sparsemax).

    Args:
        x (`torch.Tensor` of shape `(..., vocab_size)`): Any values.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: nonnegative values that sum to 1.
    """
    ordered = x.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)  # not 0 for NaNs
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0)
