# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Guidance of generation: another two-time denoiser (autoguidance), or another state (rewards)."""

from collections.abc import Callable

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from .posterior_flm import Posterior
from .time_reparameterization import translate_tau


class Autoguidance:
    r"""
    A model and a worse version of it as one: \\(\delta = \delta_m + \eta\,(\delta_m - \delta_w)\\). Has what the sampler needs
    of a model.

    The state is the concatenation of the states of both for the same text, or one state if their embeddings are equal.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to guide.
        guidance_model ([`~transformers.PreTrainedModel`]): The worse one, over the same vocabulary.
        scale (`float`): How far to go, \\(\eta\\).
    """

    def __init__(self, model: PreTrainedModel, guidance_model: PreTrainedModel, scale: float):
        self.model = model
        self.guidance_model = guidance_model
        self.scale = scale
        embedding = model.state_embedding.float()
        other = guidance_model.state_embedding.float()
        self.guidance_device = other.device
        other = other.to(embedding.device)
        self.shares_state = torch.equal(embedding, other)
        self.state_embedding = embedding if self.shares_state else torch.cat([embedding, other], dim=1)
        self.size = embedding.shape[1]
        self.state_sizes = model.state_sizes + ([] if self.shares_state else guidance_model.state_sizes)

    def posterior(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
    ) -> Posterior:
        """As [`~FLMPreTrainedModel.posterior`]; what it says may leave the simplex."""
        own, other = (state, state) if self.shares_state else state.tensor_split([self.size], dim=-1)
        times = (translate_tau(tau, self.model.time_map, self.guidance_model.time_map) for tau in (tau_s, tau_t))
        inputs = [None if x is None else x.to(self.guidance_device) for x in (other, *times, attention_mask)]
        strong = self.model.posterior(own, tau_s, tau_t, attention_mask, logits_processor)
        weak = self.guidance_model.posterior(*inputs, logits_processor)
        return strong.combine(weak, lambda delta, worse, chunk: delta + self.scale * (delta - worse))


# Soft tokens, of shape `(batch_size, length, vocab_size)` -> rewards of shape `(batch_size,)`
Reward = Callable[[torch.Tensor], torch.Tensor]


def reward_gradient(reward: Reward, look_ahead: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor):
    """
    The gradient in the state of the reward of the text that it leads to.

    Args:
        reward (`Callable[[torch.Tensor], torch.Tensor]`): From soft tokens to rewards, differentiable.
        look_ahead (`Callable[[torch.Tensor], torch.Tensor]`): From states to soft tokens.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state.

    Returns:
        `torch.Tensor` of the shape of `state`.
    """
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        rewards = reward(look_ahead(state))
        if not isinstance(rewards, torch.Tensor) or rewards.shape != state.shape[:1]:
            got = tuple(rewards.shape) if isinstance(rewards, torch.Tensor) else type(rewards).__name__
            raise ValueError(
                f"`reward` must return a tensor of shape ({len(state)},), a reward for each text, got {got}."
            )
        gradient = None
        if rewards.requires_grad:
            (gradient,) = torch.autograd.grad(rewards.sum(), state, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "`reward` must be differentiable in the soft tokens: leave out `argmax`, `detach`, `no_grad` and "
                "`inference_mode`, also around `generate()`."
            )
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "The gradient of `reward` is not finite. (Probabilities may be 0, of which there is no logarithm: with `top_k` "
                "and `top_p` most are.)"
            )
    return gradient
