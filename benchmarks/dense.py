# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Dense baseline for the benchmarks, written from the paper's formulas: noise, states and two-time denoisers are float32 tensors of
shape (batch_size, length, vocab_size). It uses the library's networks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from modeling_flm.flow import semigroup_weight
from modeling_flm.utils_flm import evaluating


def per_sequence(times: torch.Tensor) -> torch.Tensor:
    """Times of shape (batch_size,) that broadcast over positions and tokens."""
    return times[:, None, None]


def delta(model: PreTrainedModel, x: torch.Tensor, tau_s: torch.Tensor, tau_t: torch.Tensor | None) -> torch.Tensor:
    """Two-time denoiser of the states `x`: probabilities of shape (batch_size, length, vocab_size)."""
    with torch.autocast(x.device.type, enabled=False):
        state = x @ model.state_embedding.float()
    return model.predict(model.encode(state, tau_s, tau_t), tau_s, tau_t)


def flow_map(x: torch.Tensor, towards: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return per_sequence((1 - t) / (1 - s)) * x + per_sequence((t - s) / (1 - s)) * towards


def noised(model: PreTrainedModel, input_ids: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot tokens, and their noisy states at the times `tau`."""
    t = per_sequence(model.time_map.tau_to_t(tau))
    clean = F.one_hot(input_ids, model.config.vocab_size).float()
    return clean, torch.randn_like(clean).lerp_(clean, t)


def flm_loss(model: PreTrainedModel, input_ids: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    _, x = noised(model, input_ids, tau)
    with torch.autocast(x.device.type, enabled=False):
        state = x @ model.state_embedding
    logits = model.logits(model.encode(state, tau))
    return F.cross_entropy(logits.flatten(0, 1), input_ids.flatten())


def distillation_loss(
    preset: str,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    input_ids: torch.Tensor,
    tau_s: torch.Tensor,
    tau_t: torch.Tensor,
) -> torch.Tensor:
    """Loss of a preset. Where the preset has diagonal examples, they are the first half of the batch."""
    clean, x = noised(model, input_ids, tau_s)
    time = model.time_map.tau_to_t
    with torch.no_grad(), evaluating(model):
        half = 0 if preset in ("two_network", "second_stage") else len(x) // 2
        tau_t = torch.cat([tau_s[:half], tau_t[half:]])
        parts = []
        if half:
            parts.append(clean[:half] if teacher is None else delta(teacher, x[:half], tau_s[:half], tau_s[:half]))
        state, start, end = x[half:], tau_s[half:], tau_t[half:]
        if preset == "second_stage":
            parts.append(delta(teacher, state, start, end))
        else:
            middle = (start + end) / 2
            s, u, t = time(start), time(middle), time(end)
            first = delta(model, state, start, middle)
            second = delta(model, flow_map(state, first, s, u), middle, end)
            weight = per_sequence(semigroup_weight(s, u, t))
            parts.append(weight * first + (1 - weight) * second)
        target = torch.cat(parts)
    if preset in ("two_network", "second_stage"):
        losses = (target - delta(model, x, tau_s, tau_t)).square().sum(dim=-1)
        if preset == "second_stage":
            s, t = time(tau_s), time(tau_t)
            losses = ((t - s) / (1 - s)).square()[:, None] * losses
        return losses.mean()
    with torch.autocast(x.device.type, enabled=False):
        state = x @ model.state_embedding
    logits = model.logits(model.encode(state, tau_s, tau_t))
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


@torch.no_grad()
def generate(
    model: PreTrainedModel, num_samples: int, length: int, num_steps: int, delta: Callable[..., torch.Tensor] = delta
) -> torch.Tensor:
    tau = torch.linspace(0, 1, num_steps + 1, device=model.device)[:, None].expand(-1, num_samples)
    t = model.time_map.tau_to_t(tau)
    x = torch.randn(num_samples, length, model.config.vocab_size, device=model.device)
    for step in range(num_steps):
        towards = delta(model, x, tau[step], tau[step + 1])
        if step < num_steps - 1:
            x = flow_map(x, towards, t[step], t[step + 1])
    return towards.argmax(dim=-1)
