# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Guidance of generation: autoguidance combines two models, and rewards move the state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from .configuration_flm import FLOW_MODEL_TYPES
from .generation_config_flm import FLMGenerationConfig
from .posterior_flm import Posterior
from .sampling_flm import Sampler
from .time_reparameterization import translate_tau


class Autoguidance:
    r"""
    Autoguidance: a model and a weaker version of it, combined to \\(\delta = \delta_m + \eta\,(\delta_m - \delta_w)\\). Has
    the methods of a model that samplers use.

    A state is the concatenation of the states of both models for the same text, or a single state if their embeddings are
    equal. In classifier-free guidance both models are the same, and their states differ at the prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to guide.
        guidance_model ([`~transformers.PreTrainedModel`]): The weaker model, with the same vocabulary.
        scale (`float`): The strength of guidance, \\(\eta\\).
        may_share_state (`bool`, *optional*, defaults to `True`): Whether models with equal embeddings have a single state.
    """

    def __init__(
        self, model: PreTrainedModel, guidance_model: PreTrainedModel, scale: float, may_share_state: bool = True
    ):
        self.model = model
        self.guidance_model = guidance_model
        self.scale = scale
        embedding = model.state_embedding.float()
        other = guidance_model.state_embedding.float()
        self.guidance_device = other.device
        other = other.to(embedding.device)
        self.shares_state = may_share_state and torch.equal(embedding, other)
        self.state_embedding = embedding if self.shares_state else torch.cat([embedding, other], dim=1)
        self.size = embedding.shape[1]
        self.state_sizes = model.state_sizes + ([] if self.shares_state else guidance_model.state_sizes)
        self.takes_estimate = model.takes_estimate or guidance_model.takes_estimate

    def _split(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the parts of both models."""
        return (state, state) if self.shares_state else state.tensor_split([self.size], dim=-1)

    def posterior(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        estimate: torch.Tensor | None = None,
    ) -> Posterior:
        """As [`~FLMPreTrainedModel.posterior`]. The result may leave the simplex."""
        own, other = self._split(state)
        own_estimate, other_estimate = (None, None) if estimate is None else self._split(estimate)
        own_estimate = own_estimate if self.model.takes_estimate else None
        other_estimate = other_estimate if self.guidance_model.takes_estimate else None
        times = (translate_tau(tau, self.model.time_map, self.guidance_model.time_map) for tau in (tau_s, tau_t))
        inputs = [
            None if x is None else x.to(self.guidance_device) for x in (other, *times, attention_mask, other_estimate)
        ]
        strong = self.model.posterior(own, tau_s, tau_t, attention_mask, logits_processor, own_estimate)
        weak = self.guidance_model.posterior(*inputs[:4], logits_processor, inputs[4])
        return strong.combine(weak, lambda delta, worse, chunk: delta + self.scale * (delta - worse))


def add_guidance(
    model: PreTrainedModel,
    guidance_model: PreTrainedModel | None,
    config: FLMGenerationConfig,
    has_negative_prompt: bool = False,
) -> PreTrainedModel | Autoguidance:
    """
    Returns the model with the guidance that a call asks for, if any: away from a weaker model, or from another prompt. Raises a
    `ValueError` for a bad combination.
    """
    if has_negative_prompt:
        if guidance_model is not None:
            raise ValueError("`negative_prompt_ids` and `guidance_model` are two kinds of guidance: pass one of them.")
        if config.guidance_scale is None:
            raise ValueError("`negative_prompt_ids` needs a `guidance_scale`, such as 1.0.")
        # Also with a scale of 0, so that the noise is the same for every scale
        return Autoguidance(model, model, config.guidance_scale, may_share_state=False)
    if guidance_model is None:
        if config.was_passed("guidance_scale") and config.guidance_scale:
            raise ValueError(
                f"`guidance_scale={config.guidance_scale}` needs a `guidance_model`, or `negative_prompt_ids` for guidance by the prompt."
            )
        return model
    if config.guidance_scale is None:
        raise ValueError("`guidance_model` needs a `guidance_scale`, such as 1.0.")
    model_type = guidance_model.config.model_type if isinstance(guidance_model, PreTrainedModel) else None
    if model_type not in FLOW_MODEL_TYPES:
        raise ValueError(
            f"`guidance_model` must be a flow-based language model, got `{type(guidance_model).__name__}`."
        )
    if guidance_model.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"`guidance_model` has {guidance_model.config.vocab_size} tokens, but the model has "
            f"{model.config.vocab_size}: pass a model with the same tokenizer."
        )
    return model if config.guidance_scale == 0 else Autoguidance(model, guidance_model, config.guidance_scale)


# Soft tokens, of shape `(batch_size, length, vocab_size)` -> rewards of shape `(batch_size,)`
Reward = Callable[[torch.Tensor], torch.Tensor]


def check_reward(reward: Reward | None, sampler: Sampler, config: FLMGenerationConfig) -> Reward | None:
    """Returns the reward, or `None` if its scale is 0. Raises a `ValueError` for a bad combination."""
    if reward is None:
        if config.was_passed("reward_scale") and config.reward_scale:
            raise ValueError(f"`reward_scale={config.reward_scale}` needs a `reward`.")
        return None
    if not callable(reward) or isinstance(reward, PreTrainedModel):
        raise ValueError(
            f"`reward` must be a function of soft tokens, such as a `ClassifierReward`, got `{type(reward).__name__}`."
        )
    if config.reward_scale is None:
        raise ValueError("`reward` needs a `reward_scale`, such as 1.0.")
    if config.reward_scale == 0:
        return None
    if not sampler.takes_rewards:
        raise ValueError(
            f"`reward` cannot be combined with `{type(sampler).__name__}`, whose steps draw tokens: leave out `sampler_config`."
        )
    return reward


def steer_by_reward(
    reward: Reward,
    look_ahead: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    r"""
    Moves states along the gradient of a reward, \\(x \leftarrow x + \eta\,\frac{(1-s)(t-s)}{t}\,\nabla_x r(\delta)\\).

    With many short steps this follows the flow of the distribution reweighted by \\(e^{\eta\,r}\\), to first order in
    \\(\eta\\): the velocity changes by \\(\eta\,\frac{1-s}{s}\,\nabla_x r(D_s(x))\\). At the start, \\(D_0\\) does not depend on the
    noise, so the reward is computed from \\(\delta_{0,1}\\): the mean of the noise with the density \\(e^{\eta\,r}\\) relative to the
    normal one shifts by \\(\eta\,\nabla_x r\\), if the reward is linear in the noise.

    Args:
        reward (`Callable[[torch.Tensor], torch.Tensor]`): A differentiable function from soft tokens to rewards.
        look_ahead (`Callable[[torch.Tensor], torch.Tensor]`): Maps states to the soft tokens of the predicted text.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The states.
        scale (`torch.Tensor` that broadcasts with `state`): The factor of the gradient.
        factor (`torch.Tensor` of shape `(noise_size, embedding_size)`): The factor of the noise of the states.

    Returns:
        `torch.Tensor` of the shape of `state`.
    """
    gradient = reward_gradient(reward, look_ahead, state)
    # The gradient in one-hot space is `gradient @ E.T`, which moves the state by `gradient @ E.T @ E`
    with torch.autocast(state.device.type, enabled=False):
        return state + scale * ((gradient @ factor.T) @ factor)


def reward_gradient(
    reward: Reward, look_ahead: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor
) -> torch.Tensor:
    """
    Gradient, with respect to the state, of the reward of the predicted text.

    Args:
        reward (`Callable[[torch.Tensor], torch.Tensor]`): A differentiable function from soft tokens to rewards.
        look_ahead (`Callable[[torch.Tensor], torch.Tensor]`): Maps states to soft tokens.
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
                f"`reward` must return a tensor of shape ({len(state)},), a reward for each sample, got {got}."
            )
        gradient = None
        if rewards.requires_grad:
            (gradient,) = torch.autograd.grad(rewards.sum(), state, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "`reward` must be differentiable with respect to the soft tokens: leave out `argmax`, `detach`, `no_grad` and "
                "`inference_mode`, also around `generate()`."
            )
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "The gradient of `reward` is not finite. (Probabilities may be 0, whose logarithm is infinite: with `top_k` and "
                "`top_p` most are.)"
            )
    return gradient
