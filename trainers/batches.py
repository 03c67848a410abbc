# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Training examples: their times, noise and prompts.

All are functions of the seed, the step and the position of an example in the global batch. So a run does not depend on
how the global batch is spread over processes and accumulation steps, and a resumed run continues as if uninterrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch


# Rounding to float32 must not reach 1: as a time, 1 has no noise left.
_BELOW_ONE = 1 - 2**-24

# The random numbers for the prompt of an example, beside those for its noise.
_PROMPTS = 1

# Which tokens of an example may be known
PROMPT_KINDS = ("prefix", "infill", "random", "independent")


@dataclass
class FlowBatch:
    """
    Texts on their way from noise to data, and what is to be learned from them.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The clean tokens.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The same, and -100 where there is nothing to learn: at known tokens and at padding.
        tau_s (`torch.FloatTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
            The reparameterized times of the states. Known tokens have the time 1, here and below.
        tau_t (`torch.FloatTensor` of the shape of `tau_s`, *optional*):
            The times to go to, for flow maps.
        tau_u (`torch.FloatTensor` of the shape of `tau_s`, *optional*):
            Times between them, for the semigroup target.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 for positions that there are.
        noise_seeds (`list[int]`):
            A seed for the noise of each text.
        noise (`torch.FloatTensor` of shape `(batch_size, sequence_length, noise_size)`, *optional*):
            The noise, in which the networks' states are Gaussian, see [`~modeling_flm.joint_noise.JointNoise`].
        kinds (`dict[str, list[int]]`):
            For each kind of example its rows. On the host: no step waits for the device to learn them.
    """

    input_ids: torch.LongTensor
    labels: torch.LongTensor
    tau_s: torch.FloatTensor
    tau_t: torch.FloatTensor | None = None
    tau_u: torch.FloatTensor | None = None
    attention_mask: torch.Tensor | None = None
    noise_seeds: list[int] = field(default_factory=list)
    noise: torch.FloatTensor | None = None
    kinds: dict[str, list[int]] = field(default_factory=dict)

    def __getitem__(self, rows: torch.LongTensor) -> FlowBatch:
        """Some of the texts, without noise, which their states have in them."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "noise"}
        tensors = {name: value[rows] for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, noise_seeds=[], noise=None, kinds={})

    @property
    def mask(self) -> torch.BoolTensor:
        """Which tokens there is something to learn at, of shape `(batch_size, sequence_length)`."""
        return self.labels != -100


def stratified_uniforms(num_points: int, num_dimensions: int, *key: int) -> torch.FloatTensor:
    """
    Uniform random points in [0, 1)^d that are stratified in every coordinate (a Latin hypercube): each of `num_points`
    equal intervals has one, in random order.

    Args:
        num_points (`int`): The number of points.
        num_dimensions (`int`): The number of coordinates, d.
        key (`int`): What the points are a function of.

    Returns:
        `torch.FloatTensor` of shape `(num_points, num_dimensions)`, on the CPU.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    columns = [generator.permutation(num_points) + generator.random(num_points) for _ in range(num_dimensions)]
    return torch.from_numpy(np.stack(columns, axis=1) / num_points).float().clamp(max=_BELOW_ONE)


def low_discrepancy_uniforms(first: int, num_points: int, num_dimensions: int) -> torch.FloatTensor:
    """
    Points `first` to `first + num_points - 1` of a fixed sequence that fills [0, 1)^d evenly whichever part of it is
    taken: that of Kronecker with powers of the generalized golden ratio.

    Returns:
        `torch.FloatTensor` of shape `(num_points, num_dimensions)`, on the CPU.
    """
    ratio = 1.5
    for _ in range(50):  # the root of x^(d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (num_dimensions + 1))
    steps = ratio ** -torch.arange(1, num_dimensions + 1, dtype=torch.float64)
    index = torch.arange(first, first + num_points, dtype=torch.float64)
    return ((index[:, None] + 0.5) * steps % 1).float().clamp(max=_BELOW_ONE)


def draw_known_masks(
    seeds: Sequence[int],
    real: torch.BoolTensor,
    longest: int,
    fraction: float,
    kinds: Sequence[str] = PROMPT_KINDS[:3],
) -> torch.BoolTensor:
    """
    Which tokens of each example are known, for a model to learn to write the rest. For a beginning (`"prefix"`), what is
    around a gap (`"infill"`) and tokens at random (`"random"`) at least one token is known and one is not, and every number of
    them is equally likely. For `"independent"` tokens, each is known with a probability that is uniform for the example, so
    that all of them may be, or none.

    Args:
        seeds (`Sequence[int]`): One seed per example.
        real (`torch.BoolTensor` of shape `(len(seeds), length)`): Where there are tokens, and no padding.
        longest (`int`): The length of the longest example, so that how far a batch is padded changes nothing.
        fraction (`float`): The share of the examples of which anything is known.
        kinds (`Sequence[str]`): Which of these there are, equally often each.

    Returns:
        `torch.BoolTensor` of the shape of `real`, and on its device.
    """
    uniforms = np.stack([np.random.default_rng([seed, _PROMPTS]).random(4 + longest) for seed in seeds])
    uniforms = torch.from_numpy(uniforms).to(real.device, torch.float32, non_blocking=True)
    uniforms = uniforms.clamp(max=_BELOW_ONE)
    has_prompt, kind, size, place = uniforms[:, :4, None].unbind(dim=1)
    num_tokens = real.sum(dim=1, keepdim=True)
    rank = real.cumsum(dim=1) - 1  # among the tokens of the example
    num_chosen = 1 + (size * (num_tokens - 1)).floor()
    start = (place * (num_tokens - num_chosen + 1)).floor()
    is_beginning = rank < num_chosen
    is_outside = (rank < start) | (rank >= start + num_chosen)
    lots = uniforms[:, 4 : 4 + real.shape[1]].masked_fill(~real, 1.0)
    masks = {
        "prefix": is_beginning,
        "infill": is_outside,
        "random": lots.argsort(dim=1).argsort(dim=1) < num_chosen,
        "independent": lots < size,
    }
    known = torch.zeros_like(real)
    for index, name in enumerate(kinds):
        is_kind = (kind >= index / len(kinds)) & (kind < (index + 1) / len(kinds))
        known |= is_kind & masks[name]
    return known & real & (has_prompt < fraction) & (num_tokens > 1)


def example_seed(*key: int) -> int:
    """A seed for one example, for `key` such as (seed, step, position)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def draw_noise(seeds: Sequence[int], *size: int, device: torch.device) -> torch.FloatTensor:
    """
    Standard normal noise for each example from its own seed.

    Args:
        seeds (`Sequence[int]`): One seed per example.
        size (`int`): The size of the noise of one example.
        device (`torch.device`): Where to draw it; devices draw different numbers.

    Returns:
        `torch.FloatTensor` of shape `(len(seeds), *size)`.
    """
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), *size, device=device)
    for row, seed in zip(noise, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    return noise
