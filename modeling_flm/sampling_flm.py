# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Samplers: what a step of generation takes from the model, and how it moves the state. A step is a function of what the model
says, the times and the state; the loop is [`~FLMGenerationMixin.generate`]'s.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .flow import bridge_coefficients, expand_times, flow_map, gamma_coefficients
from .posterior_flm import Posterior, Reader, drawn, mean_embedding, most_likely
from .time_reparameterization import TimeMap


@dataclass
class SamplerConfig:
    """Configuration of a [`Sampler`]: the parameters that it is stored with."""

    def to_dict(self) -> dict[str, Any]:
        """The parameters, and the name of the class to load them back into."""
        return {**asdict(self), "_cls_name": type(self).__name__}

    def build(self) -> Sampler:
        """The sampler."""
        raise NotImplementedError


@dataclass
class FlowMapSamplerConfig(SamplerConfig):
    """Configuration of a [`FlowMapSampler`], which has no parameters."""

    def build(self) -> Sampler:
        return FlowMapSampler()


@dataclass
class StochasticFlowMapSamplerConfig(SamplerConfig):
    """
    Configuration of a [`StochasticFlowMapSampler`].

    Args:
        gamma (`float`, *optional*, defaults to 1.0):
            The share of the noise, in [0, 1] and in standard deviations, that is drawn anew at every step but the last.
    """

    gamma: float = 1.0

    def __post_init__(self):
        is_number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if not is_number or not math.isfinite(self.gamma) or not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` must be a number in [0, 1], got {self.gamma!r}.")

    def build(self) -> Sampler:
        return StochasticFlowMapSampler(self.gamma) if self.gamma > 0 else FlowMapSampler()


@dataclass
class BridgeSamplerConfig(SamplerConfig):
    """Configuration of a [`BridgeSampler`], which has no parameters: `temperature`, `top_k` and `top_p` are those of all samplers."""

    def build(self) -> Sampler:
        return BridgeSampler()


_CONFIGS = (FlowMapSamplerConfig, StochasticFlowMapSamplerConfig, BridgeSamplerConfig)


def load_sampler_config(value: Any) -> SamplerConfig:
    """
    A sampler's configuration from what was stored of it, or from an object of this name: code that comes with a model has
    other classes than an installed package.

    Args:
        value (`SamplerConfig` or `dict[str, Any]`): The configuration, or what its `to_dict` returned.

    Returns:
        [`SamplerConfig`]: of one of the samplers below.
    """
    classes = {config.__name__: config for config in _CONFIGS}
    settings = dict(value) if isinstance(value, dict) else {**vars(value)} if type(value).__name__ in classes else None
    name = type(value).__name__ if not isinstance(value, dict) else settings.pop("_cls_name", None)
    if settings is None or name not in classes:
        raise ValueError(f"`sampler_config` must be one of {', '.join(classes)}, got {value!r}.")
    return classes[name](**settings)


class Sampler:
    """What a step takes from the model's posterior, and how it moves the state. Subclasses define `move`, and what differs."""

    draws_noise = False  # new noise at every step but the last
    draws_tokens = False  # tokens at every step
    takes_rewards = True  # whether moving the state towards a reward goes with it

    def target_tau(self, tau_s: torch.Tensor, tau_t: torch.Tensor, time_map: TimeMap) -> torch.Tensor:
        """The reparameterized time that the model is asked to go to, in a step from `tau_s` to `tau_t`, of any shape."""
        return tau_t

    def read_tokens(self, uniforms: torch.Tensor | None) -> Reader:
        """How tokens are read from a posterior. `uniforms` has shape `(batch_size, sequence_length)` if tokens are drawn."""
        return most_likely

    def estimate(
        self, posterior: Posterior, embedding: torch.Tensor, uniforms: torch.Tensor | None, with_tokens: bool
    ) -> tuple[torch.Tensor, torch.LongTensor | None]:
        """
        What the text is estimated to be.

        Args:
            posterior ([`~posterior_flm.Posterior`]): What the model says.
            embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding of the states.
            uniforms (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): To draw tokens by.
            with_tokens (`bool`): Whether tokens are wanted, too.

        Returns:
            `tuple[torch.Tensor, torch.LongTensor]`: the state of the estimate, of shape
            `(batch_size, sequence_length, embedding_size)`, and tokens, or `None`.
        """
        tokens = [self.read_tokens(uniforms)] if with_tokens else []
        mean, *tokens = posterior.read(mean_embedding(embedding), *tokens)
        return mean, tokens[0] if with_tokens else None

    def move(
        self,
        state: torch.Tensor,
        estimate: torch.Tensor,
        s: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The state at time `t`.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state at time `s`.
            estimate (`torch.Tensor` of the shape of `state`): The state of the estimated text.
            s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): Interpolant times; where both are
                1, the state stays.
            t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at.
            noise (`torch.Tensor` of the shape of `state`, *optional*): A new state of noise, if any is drawn.
        """
        raise NotImplementedError


class FlowMapSampler(Sampler):
    r"""
    Follows the flow, \\(x \leftarrow X_{s,t}(x)\\); for an FLM this is an Euler step. The text is what is most likely at the
    end. Nothing is random but the noise that a text starts from.
    """

    def move(self, state, estimate, s, t, noise):
        return flow_map(state, estimate, s, t)


class StochasticFlowMapSampler(Sampler):
    r"""
    Draws a part of the noise anew at every step: goes on to the later time \\(u\\), and back to \\(t\\) with new noise, see
    [`~flow.gamma_coefficients`]. It is meant for flow maps: an FLM, which cannot jump, needs `gamma` to be small.

    Args:
        gamma (`float`): The share of the noise, above 0 and at most 1.
    """

    draws_noise = True

    def __init__(self, gamma: float):
        self.gamma = gamma

    def target_tau(self, tau_s, tau_t, time_map):
        later, _, _ = gamma_coefficients(time_map.tau_to_t(tau_t), self.gamma)
        return time_map.t_to_tau(later)

    def move(self, state, estimate, s, t, noise):
        later, excess, fresh = gamma_coefficients(t, self.gamma)
        arrived = flow_map(state, estimate, s, later) - expand_times(excess, state) * estimate
        return arrived + expand_times(fresh, state) * noise


class BridgeSampler(Sampler):
    r"""
    Draws tokens of the denoiser \\(D_s = \delta_{s,s}\\), and moves the state towards them along a bridge, see
    [`~flow.bridge_coefficients`]; at the end the tokens that were drawn last are the text. So `temperature`, `top_k` and
    `top_p` count at every step. Exact for a single token. The tokens of one step are drawn independently of each other, so
    that texts have the model's joint distribution only in the limit of many steps.
    """

    draws_noise = True
    draws_tokens = True
    takes_rewards = False

    def target_tau(self, tau_s, tau_t, time_map):
        return tau_s

    def read_tokens(self, uniforms):
        return drawn(uniforms)

    def estimate(self, posterior, embedding, uniforms, with_tokens):
        tokens = posterior.draw(uniforms)
        return embedding[tokens], tokens

    def move(self, state, estimate, s, t, noise):
        a, b, c = (expand_times(factor, state) for factor in bridge_coefficients(s, t))
        return a * state + b * estimate + c * noise


class CommitRule:
    """
    A rule of which tokens become known after each round. This one is that of generation without rounds: everything is written
    once, and stays.
    """

    num_rounds: int | None = None
    fresh_noise: bool = False
    reads_probabilities = False  # of the tokens that were written

    @property
    def draws_noise(self) -> bool:
        """Whether new noise is drawn on the way."""
        return self.fresh_noise and self.num_rounds > 1

    def due(self, round: int, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        The tokens that this round is about; a text that has none of them is left as it is.

        Args:
            round (`int`): The number of the round, from 0.
            is_open (`torch.BoolTensor` of shape `(num_texts, length)`): Where tokens are not known.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open

    def commit(self, round: int, probabilities: torch.Tensor | None, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        The tokens that are known from now on.

        Args:
            round (`int`): The number of the round, from 0.
            probabilities (`torch.Tensor` of shape `(num_texts, length)`, *optional*):
                How likely the written tokens are, if the rule reads that.
            is_open (`torch.BoolTensor` of shape `(num_texts, length)`): Where tokens are not known.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open


@dataclass
class PosteriorRefinement(CommitRule):
    """
    Every round writes what is not known. Tokens that are likely enough become known, and besides, the likeliest of each text up
    to a budget; what is left is written again. After the last round everything stays as it is.

    Args:
        num_rounds (`int`): The number of rounds.
        threshold (`float`, *optional*): The probability that is enough. By default none is.
        budget (`int` or `str`, *optional*):
            How many of the likeliest become known whatever their probability: a number of tokens, `"uniform"` for as many as
            leave equally many to each round, or `None` for none.
        fresh_noise (`bool`): Whether the rest starts from new noise, and not from what it started from before.
    """

    num_rounds: int
    threshold: float | None = None
    budget: int | str | None = "uniform"
    fresh_noise: bool = True

    reads_probabilities = True

    def commit(self, round, probabilities, is_open):
        if round == self.num_rounds - 1:
            return is_open
        chosen = torch.zeros_like(is_open)
        if self.threshold is not None:
            chosen |= probabilities >= self.threshold
        if self.budget is not None:
            num_open = is_open.sum(dim=1, keepdim=True)
            rounds_left = self.num_rounds - round
            budget = (num_open + rounds_left - 1) // rounds_left if self.budget == "uniform" else self.budget
            ordered = probabilities.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
            chosen |= ordered.argsort(dim=1) < budget
        return chosen & is_open


@dataclass
class BlockByBlock(CommitRule):
    """
    From left to right, a block at a time: every round writes what is not known up to the end of the text, and its block becomes
    known.

    Args:
        block_length (`int`): The number of tokens of a block.
        length (`int`): The number of tokens of a text.
        fresh_noise (`bool`): Whether the rest starts from new noise, and not from what it started from before.
    """

    block_length: int
    length: int
    fresh_noise: bool = True

    @property
    def num_rounds(self) -> int:
        return -(-self.length // self.block_length)

    def due(self, round, is_open):
        block = torch.zeros_like(is_open)
        block[:, round * self.block_length : (round + 1) * self.block_length] = True
        return is_open & block

    def commit(self, round, probabilities, is_open):
        return self.due(round, is_open)


__all__ = [
    "BlockByBlock",
    "BridgeSampler",
    "BridgeSamplerConfig",
    "CommitRule",
    "FlowMapSampler",
    "FlowMapSamplerConfig",
    "PosteriorRefinement",
    "Sampler",
    "SamplerConfig",
    "StochasticFlowMapSampler",
    "StochasticFlowMapSamplerConfig",
]
