# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Samplers, which turn the model's posterior into the next state, and rules that commit tokens after a refinement round. Both are
functions without state; the loops are in [`~FLMGenerationMixin.generate`].
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .flow import bridge_coefficients, expand_times, flow_map, gamma_coefficients
from .posterior_flm import Posterior, Reader, drawn, mean_embedding, most_likely
from .time_reparameterization import TimeMap
from .utils_flm import as_python


@dataclass
class SamplerConfig:
    """Base class of the configurations of samplers, saved in `generation_config.json`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the parameters and the name of the class."""
        return {**asdict(self), "_cls_name": type(self).__name__}

    def build(self) -> Sampler:
        """Returns the sampler."""
        raise NotImplementedError


@dataclass
class FlowMapSamplerConfig(SamplerConfig):
    """Configuration of a [`FlowMapSampler`]. It has no parameters."""

    def build(self) -> Sampler:
        return FlowMapSampler()


@dataclass
class StochasticFlowMapSamplerConfig(SamplerConfig):
    """
    Configuration of a [`StochasticFlowMapSampler`].

    Args:
        gamma (`float`, *optional*, defaults to 1.0):
            Share of the noise, in [0, 1] and in standard deviations, that is drawn anew at every step but the last.
    """

    gamma: float = 1.0

    def __post_init__(self):
        self.gamma = as_python(self.gamma)
        is_number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if not is_number or not math.isfinite(self.gamma) or not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` must be a number in [0, 1], got {self.gamma!r}.")

    def build(self) -> Sampler:
        return StochasticFlowMapSampler(self.gamma) if self.gamma > 0 else FlowMapSampler()


@dataclass
class BridgeSamplerConfig(SamplerConfig):
    """Configuration of a [`BridgeSampler`]. It has no parameters besides the `temperature`, `top_k` and `top_p` of all samplers."""

    def build(self) -> Sampler:
        return BridgeSampler()


_CONFIGS = (FlowMapSamplerConfig, StochasticFlowMapSamplerConfig, BridgeSamplerConfig)


def load_sampler_config(value: Any) -> SamplerConfig:
    """
    Loads a sampler's configuration from a dictionary, or from an object of another class of the same name: remote code and an
    installed package have different classes.

    Args:
        value (`SamplerConfig` or `dict[str, Any]`): The configuration, or the result of its `to_dict`.

    Returns:
        [`SamplerConfig`]: The configuration of one of the samplers below.
    """
    classes = {config.__name__: config for config in _CONFIGS}
    settings = dict(value) if isinstance(value, dict) else {**vars(value)} if type(value).__name__ in classes else None
    name = type(value).__name__ if not isinstance(value, dict) else settings.pop("_cls_name", None)
    if settings is None or name not in classes:
        raise ValueError(f"`sampler_config` must be one of {', '.join(classes)}, got {value!r}.")
    return classes[name](**settings)


class Sampler:
    """Base class of samplers. A subclass defines `move`, and overrides `estimate` if it does not use the posterior mean."""

    draws_noise = False  # whether every step but the last adds new noise
    draws_tokens = False  # whether every step draws tokens
    takes_rewards = True  # whether the sampler can be combined with a reward

    def target_tau(self, tau_s: torch.Tensor, tau_t: torch.Tensor, time_map: TimeMap) -> torch.Tensor:
        """Reparameterized target time of the model in a step from `tau_s` to `tau_t`, all of the same shape."""
        return tau_t

    def read_tokens(self, uniforms: torch.Tensor | None) -> Reader:
        """Returns the reader of tokens. `uniforms`, of shape `(batch_size, sequence_length)`, is needed to draw tokens."""
        return most_likely

    def estimate(
        self,
        posterior: Posterior,
        embedding: torch.Tensor,
        uniforms: torch.Tensor | None,
        with_tokens: bool,
        *readers: Reader,
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Estimates the clean text.

        Args:
            posterior ([`~posterior_flm.Posterior`]): The posterior of the clean tokens.
            embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding of the states.
            uniforms (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): Uniform variables to draw tokens.
            with_tokens (`bool`): Whether to return tokens as well.
            readers (`Callable[[torch.Tensor, slice], torch.Tensor]`): What else to read from the posterior, see [`~Posterior.read`].

        Returns:
            `tuple[torch.Tensor, ...]`: The state of the estimated text, of shape
            `(batch_size, sequence_length, embedding_size)`, tokens of shape `(batch_size, sequence_length)` or `None`, and what
            `readers` read.
        """
        if not with_tokens:
            mean, *readings = posterior.read(mean_embedding(embedding), *readers)
            return mean, None, *readings
        return posterior.read(mean_embedding(embedding), self.read_tokens(uniforms), *readers)

    def move(
        self,
        state: torch.Tensor,
        estimate: torch.Tensor,
        s: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Moves the state from time `s` to time `t`.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state at time `s`.
            estimate (`torch.Tensor` of the shape of `state`): The state of the estimated text.
            s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                Interpolant times. Where `s` and `t` are 1, the state stays.
            t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at.
            noise (`torch.Tensor` of the shape of `state`, *optional*): New states of noise, if `draws_noise`.

        Returns:
            `torch.Tensor` of the shape of `state`.
        """
        raise NotImplementedError


class FlowMapSampler(Sampler):
    r"""
    Follows the flow, \\(x \leftarrow X_{s,t}(x)\\). For an FLM this is an Euler step. The last step returns the most likely
    tokens. Deterministic, given the noise at the start.
    """

    def move(self, state, estimate, s, t, noise):
        return flow_map(state, estimate, s, t)


class StochasticFlowMapSampler(Sampler):
    r"""
    Redraws part of the noise at every step: jumps to a later time \\(u\\), then adds new noise to return to \\(t\\), see
    [`~flow.gamma_coefficients`]. Meant for flow maps: an FLM cannot jump, and needs a small `gamma`.

    Args:
        gamma (`float` or `torch.Tensor` of shape `(batch_size,)`): Share of the noise, above 0 and at most 1.
    """

    draws_noise = True

    def __init__(self, gamma: float | torch.Tensor):
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
    Draws tokens from the denoiser \\(D_s = \delta_{s,s}\\) and moves the state towards them along a bridge, see
    [`~flow.bridge_coefficients`]. The last step returns its drawn tokens, so `temperature`, `top_k` and `top_p` take effect at
    every step. Exact for a single token. The tokens of one step are drawn independently, so samples have the model's joint
    distribution only in the limit of many steps.
    """

    draws_noise = True
    draws_tokens = True
    takes_rewards = False

    def target_tau(self, tau_s, tau_t, time_map):
        return tau_s

    def read_tokens(self, uniforms):
        return drawn(uniforms)

    def estimate(self, posterior, embedding, uniforms, with_tokens, *readers):
        tokens, *readings = posterior.read(drawn(uniforms), *readers)
        return embedding[tokens], tokens, *readings

    def move(self, state, estimate, s, t, noise):
        a, b, c = (expand_times(factor, state) for factor in bridge_coefficients(s, t))
        return a * state + b * estimate + c * noise


@dataclass
class StoppingRule:
    """
    Ends the steps of a text that is settled before the last one, see `stability_threshold` and `confidence_threshold` of
    [`FLMGenerationConfig`]. Each text is judged by itself.

    Args:
        stability_threshold (`int`, *optional*): Number of steps for which the tokens must have stayed the same.
        confidence_threshold (`float`, *optional*): What the mean entropy of the unknown tokens must be below, in nats.
    """

    stability_threshold: int | None = None
    confidence_threshold: float | None = None

    def is_settled(
        self, num_same: torch.LongTensor, entropies: torch.Tensor, is_open: torch.BoolTensor
    ) -> torch.BoolTensor:
        """
        Mask of the texts that are settled.

        Args:
            num_same (`torch.LongTensor` of shape `(batch_size,)`): Number of steps for which the tokens have stayed the same.
            entropies (`torch.Tensor` of shape `(batch_size, length)`): Entropies of the predictions.
            is_open (`torch.BoolTensor` of shape `(batch_size, length)`): Mask of the unknown tokens.
        """
        settled = torch.ones_like(num_same, dtype=torch.bool)
        if self.stability_threshold is not None:
            settled &= num_same >= self.stability_threshold
        if self.confidence_threshold is not None:
            mean = (entropies * is_open).sum(dim=1) / is_open.sum(dim=1).clamp(min=1)
            settled &= mean < self.confidence_threshold
        return settled


class CommitRule:
    """
    Base class of the rules that commit tokens after each refinement round. Used itself, it commits all tokens at once:
    generation without rounds.
    """

    num_rounds: int | None = None
    fresh_noise: bool = False
    reads_probabilities = False  # whether `commit` needs the probabilities of the generated tokens

    @property
    def draws_noise(self) -> bool:
        """Whether later rounds start from new noise."""
        return self.fresh_noise and self.num_rounds > 1

    def due(self, round: int, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        Mask of the tokens that may be committed in this round. Sequences without any are not regenerated.

        Args:
            round (`int`): Index of the round, from 0.
            is_open (`torch.BoolTensor` of shape `(batch_size, length)`): Mask of the unknown tokens.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open

    def commit(self, round: int, probabilities: torch.Tensor | None, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        Mask of the tokens to commit after this round.

        Args:
            round (`int`): Index of the round, from 0.
            probabilities (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                Probabilities of the generated tokens, if `reads_probabilities`.
            is_open (`torch.BoolTensor` of shape `(batch_size, length)`): Mask of the unknown tokens.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open


@dataclass
class PosteriorRefinement(CommitRule):
    """
    Posterior refinement: every round regenerates all unknown tokens, then commits those above a threshold and the most likely
    ones up to a budget. The last round commits all tokens.

    Args:
        num_rounds (`int`): Number of rounds.
        threshold (`float`, *optional*): Commit tokens with at least this probability. Disabled by default.
        budget (`int` or `str`, *optional*):
            Number of tokens of each sequence to commit whatever their probability, the most likely first. `"uniform"` divides
            the unknown tokens evenly among the rounds that are left; `None` commits none.
        fresh_noise (`bool`): Whether later rounds start from new noise, instead of the noise of the first round.
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
    Generation from left to right: every round regenerates all unknown tokens, and commits the next block.

    Args:
        block_length (`int`): Number of tokens of a block.
        length (`int`): Number of tokens of a sequence.
        fresh_noise (`bool`): Whether later rounds start from new noise, instead of the noise of the first round.
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
    "StoppingRule",
    "StochasticFlowMapSampler",
    "StochasticFlowMapSamplerConfig",
]
