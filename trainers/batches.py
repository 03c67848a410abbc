# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Training batches: noise levels, noise and known tokens of the examples.

Every random number is a function of the seed, the step and the position of an example in the global batch. So a run does not
depend on how the global batch is split over processes and accumulation steps, and a resumed run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from modeling_flm.flow import times_with_known

from .data.checking import check_length


# Rounding to float32 must not reach 1: as a time, 1 has no noise left.
_BELOW_ONE = 1 - 2**-24

# Parts of a seed: an example's prompt, whether it is dropped, and its noise have different random numbers.
_PROMPTS, _DROPOUT = 1, 2

# Patterns of known tokens in an example
PROMPT_KINDS = ("prefix", "infill", "random", "independent", "confident")

# The two times of a pair differ by at least this much, so that quotients of differences keep their precision.
MIN_DIFFERENCE = 1e-3

# Smallest distance from 0 and 1 of the times to which distribution matching noises texts
MATCHING_MARGIN = 0.02


@dataclass
class FlowBatch:
    """
    Training examples with their noise levels: the input of [`FLMTrainer.training_objective`]. [`make_flow_batch`] draws one.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Clean tokens.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Clean tokens, or -100 where the loss does not count: at known tokens and padding.
        tau_s (`torch.FloatTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
            Reparameterized times of the states. Known tokens have time 1, here and below.
        tau_t (`torch.FloatTensor` of the shape of `tau_s`, *optional*):
            Target times, for flow maps.
        tau_u (`torch.FloatTensor` of the shape of `tau_s`, *optional*):
            Intermediate times, for the semigroup target.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 for real positions, 0 for padding.
        noise_seeds (`list[int]`):
            Seed of each example's noise, for `with_noise`.
        noise (`torch.FloatTensor` of shape `(batch_size, sequence_length, noise_size)`, *optional*):
            Standard normal variables, see [`~modeling_flm.joint_noise.JointNoise`]. [`FLMTrainer`] draws them where they are
            missing.
        groups (`dict[str, list[int]]`):
            Rows of each group of examples; the logs have the loss of every group. On the host, so that no step waits for the
            device.
    """

    input_ids: torch.LongTensor
    labels: torch.LongTensor
    tau_s: torch.FloatTensor
    tau_t: torch.FloatTensor | None = None
    tau_u: torch.FloatTensor | None = None
    attention_mask: torch.Tensor | None = None
    noise_seeds: list[int] = field(default_factory=list)
    noise: torch.FloatTensor | None = None
    groups: dict[str, list[int]] = field(default_factory=dict)

    # `Trainer` counts the examples and tokens of its inputs, which it reads by name.
    def __len__(self) -> int:
        return len(self.input_ids)

    def __contains__(self, name: str) -> bool:
        return name in self.__dataclass_fields__ and self[name] is not None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def select(self, rows: torch.LongTensor) -> FlowBatch:
        """Returns the examples of some rows, without their noise."""
        tensors = {each.name: self[each.name] for each in fields(self) if each.name != "noise"}
        tensors = {name: value[rows] for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, noise_seeds=[], noise=None, groups={})

    def with_noise(self, noise_size: int, max_length: int | None = None) -> FlowBatch:
        """
        Returns the batch with noise drawn from `noise_seeds`.

        Args:
            noise_size (`int`): Number of variables per token, see [`~modeling_flm.joint_noise.noise_size`].
            max_length (`int`, *optional*): As for [`make_flow_batch`].
        """
        length = self.input_ids.shape[1]
        noise = draw_noise(self.noise_seeds, max_length or length, noise_size, device=self.input_ids.device)
        return replace(self, noise=noise[:, :length])

    @property
    def mask(self) -> torch.BoolTensor:
        """Tokens that the loss counts, of shape `(batch_size, sequence_length)`."""
        return self.labels != -100

    @property
    def known(self) -> torch.BoolTensor:
        """Known tokens, of shape `(batch_size, sequence_length)`. A batch with one time per sequence has none."""
        return self.tau_s == 1 if self.tau_s.dim() == 2 else torch.zeros_like(self.mask)


@dataclass
class FlowTimes:
    """
    Times of the examples of a batch, drawn by a time sampler such as [`UniformTimes`] or [`TimePairs`].

    Args:
        tau_s (`torch.FloatTensor` of shape `(batch_size,)`): As for [`FlowBatch`], before tokens are known.
        tau_t (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): As for [`FlowBatch`].
        tau_u (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): As for [`FlowBatch`].
        groups (`dict[str, list[int]]`): As for [`FlowBatch`].
    """

    tau_s: torch.FloatTensor
    tau_t: torch.FloatTensor | None = None
    tau_u: torch.FloatTensor | None = None
    groups: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class UniformTimes:
    """
    Time sampler of [`FLMTrainer`]: one time per example, uniform in the reparameterized time. With self-conditioning, every other
    example of the global batch is in the group `"self_conditioned"`, which reads an estimate of the text.

    Args:
        self_conditioning (`bool`, *optional*, defaults to `False`): As for [`FLMConfig`].
    """

    self_conditioning: bool = False

    num_uniforms = 1  # per example

    def __call__(self, uniforms: torch.FloatTensor, positions: Sequence[int]) -> FlowTimes:
        """
        Returns the times of some examples.

        Args:
            uniforms (`torch.FloatTensor` of shape `(batch_size, num_uniforms)`): Uniform random numbers.
            positions (`Sequence[int]`): Positions of the examples in the global batch.
        """
        rows = [row for row, position in enumerate(positions) if position % 2 == 1] if self.self_conditioning else []
        return FlowTimes(uniforms[:, 0], groups={"self_conditioned": rows} if rows else {})


@dataclass
class TimePairs:
    """
    Time sampler of [`FMLMTrainer`]: for each example two times and one between them. The groups of examples are `"diagonal"`,
    where both times are equal, `"boundary"`, from 0 to 1, `"off_diagonal"`, all other pairs, and `"masked"`, at time 0.

    Args:
        diagonal_fraction, boundary_probability, masked_probability, time_sampling, intermediate_time:
            As for [`FMLMTrainingArguments`].
        max_tau_t (`float`, *optional*, defaults to 1.0): Largest target time of a pair.
    """

    diagonal_fraction: float = 0.5
    boundary_probability: float = 1 / 32
    masked_probability: float = 0.0
    time_sampling: str = "uniform_difference"
    intermediate_time: str = "midpoint"
    max_tau_t: float = 1.0

    @property
    def num_uniforms(self) -> int:
        return 4 if self.masked_probability == 0 else 5

    def __call__(self, uniforms: torch.FloatTensor, positions: Sequence[int]) -> FlowTimes:
        """Returns the times of some examples, see [`UniformTimes`]."""
        first, second, third, fourth = uniforms.T[:4]
        if self.time_sampling == "uniform_difference":
            difference = MIN_DIFFERENCE + (1 - MIN_DIFFERENCE) * first
            start = second * (1 - difference)
            end = start + difference
        else:
            start, end = torch.minimum(first, second), torch.maximum(first, second)
            end = torch.maximum(end, start + MIN_DIFFERENCE).clamp(max=1.0)
            start = torch.minimum(start, end - MIN_DIFFERENCE)
        is_boundary = fourth < self.boundary_probability
        start, end = start.masked_fill(is_boundary, 0.0), end.masked_fill(is_boundary, 1.0)
        end = end.clamp(max=self.max_tau_t)
        # Diagonal examples are spread evenly over the global batch.
        share = self.diagonal_fraction
        is_diagonal = torch.tensor([int((n + 1) * share) > int(n * share) for n in positions])
        start, end = torch.where(is_diagonal, first, start), torch.where(is_diagonal, first, end)
        is_masked = torch.zeros_like(is_diagonal)
        if self.masked_probability > 0:
            is_masked = uniforms[:, 4] < self.masked_probability
            start, end = start.masked_fill(is_masked, 0.0), end.masked_fill(is_masked, 0.0)
        fraction = third if self.intermediate_time == "random" else 0.5
        groups = {"masked": is_masked, "diagonal": is_diagonal & ~is_masked}
        groups["boundary"] = is_boundary & ~(is_diagonal | is_masked)
        groups["off_diagonal"] = ~(is_boundary | is_diagonal | is_masked)
        rows = {group: mask.nonzero()[:, 0].tolist() for group, mask in groups.items()}
        return FlowTimes(start, end, start + fraction * (end - start), rows)


@dataclass
class MatchingTimes:
    """
    Time sampler of [`DistributionMatchingTrainer`]. An example starts at `tau_s`, jumps to 1, and is noised to `tau_u`, which is
    uniform but not close to 0 or 1. The groups of examples are `"boundary"`, which start at 0, and `"off_diagonal"`.

    Args:
        boundary_probability, num_start_times: As for [`FMLMTrainingArguments`].
    """

    boundary_probability: float = 0.5
    num_start_times: int = 8

    num_uniforms = 3  # per example

    def __call__(self, uniforms: torch.FloatTensor, positions: Sequence[int]) -> FlowTimes:
        """Returns the times of some examples, see [`UniformTimes`]."""
        first, second, third = uniforms.T
        start = (1 + (second * (self.num_start_times - 1)).floor()) / self.num_start_times
        is_boundary = first < self.boundary_probability
        groups = {"boundary": is_boundary, "off_diagonal": ~is_boundary}
        rows = {group: mask.nonzero()[:, 0].tolist() for group, mask in groups.items()}
        margin = MATCHING_MARGIN
        return FlowTimes(
            start.masked_fill(is_boundary, 0.0), torch.ones_like(start), margin + (1 - 2 * margin) * third, rows
        )


def make_flow_batch(
    examples: Mapping[str, torch.Tensor],
    uniforms: torch.FloatTensor,
    positions: Sequence[int],
    key: Sequence[int],
    time_sampler: Callable[[torch.FloatTensor, Sequence[int]], FlowTimes] | None = None,
    max_length: int | None = None,
    prompt_fraction: float = 0.0,
    prompt_kinds: Sequence[str] = PROMPT_KINDS[:3],
    prompts_from_labels: bool = False,
    prompt_dropout: float = 0.0,
    pad_token_id: int | None = None,
    device: torch.device | None = None,
) -> FlowBatch:
    """
    Makes a training batch of tokenized examples: draws their times and known tokens, and seeds their noise, which
    [`FlowBatch.with_noise`] draws when it is needed. Equal arguments give equal batches.

    Args:
        examples (`Mapping[str, torch.Tensor]`):
            `input_ids`, `labels` and, where there is padding, `attention_mask`, each of shape
            `(batch_size, sequence_length)`, as [`DataCollatorForFLM`] makes them.
        uniforms (`torch.FloatTensor` of shape `(batch_size, num_uniforms)`):
            Uniform random numbers for the times, from [`stratified_uniforms`] or [`low_discrepancy_uniforms`].
        positions (`Sequence[int]`):
            Positions of the examples in the global batch.
        key (`Sequence[int]`):
            Integers that identify the batch, such as (seed, step). Combined with a position, they seed an example.
        time_sampler ([`UniformTimes`] or [`TimePairs`], *optional*):
            Turns `uniforms` into times. By default [`UniformTimes`].
        max_length (`int`, *optional*):
            Length of the longest sequence of the training. Random numbers are drawn for this length, so that they do not
            depend on how far a batch is padded. By default the length of this batch.
        prompt_fraction, prompt_kinds, prompts_from_labels:
            Which tokens are known, as for [`FLMTrainingArguments`].
        prompt_dropout (`float`, *optional*, defaults to 0.0):
            Fraction of the examples whose known tokens are replaced by `pad_token_id`.
        pad_token_id (`int`, *optional*):
            Needed for `prompt_dropout`.
        device (`torch.device`, *optional*):
            Device of the batch. By default the device of `examples`.

    Returns:
        [`FlowBatch`] without noise.

    Example:

    ```python
    >>> import torch
    >>> from modeling_flm.trainers import DataCollatorForFLM, make_flow_batch
    >>> from modeling_flm.trainers.batches import stratified_uniforms

    >>> examples = DataCollatorForFLM()([{"input_ids": [5, 2, 7]}, {"input_ids": [4, 9]}])
    >>> key = (0, 1)  # seed and step
    >>> batch = make_flow_batch(examples, stratified_uniforms(2, 1, *key), range(2), key).with_noise(16)
    >>> batch.labels.tolist()
    [[5, 2, 7], [4, 9, -100]]
    >>> batch.tau_s.shape, batch.noise.shape
    (torch.Size([2]), torch.Size([2, 3, 16]))
    ```
    """
    if "labels" not in examples:
        raise ValueError(
            "`data_collator` must make `labels`, as `DataCollatorForFLM` does: tokens, and -100 for padding."
        )
    length = examples["input_ids"].shape[1]
    max_length = length if max_length is None else max_length
    check_length("`examples`", length, max_length)
    device = examples["input_ids"].device if device is None else device
    input_ids, labels = examples["input_ids"].to(device), examples["labels"].to(device)
    attention_mask = examples.get("attention_mask")
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    # 1. Times, from the host without waiting
    drawn = (UniformTimes() if time_sampler is None else time_sampler)(uniforms, positions)
    times = {name: getattr(drawn, name) for name in ("tau_s", "tau_t", "tau_u")}
    times = {name: None if tau is None else tau.to(device, non_blocking=True) for name, tau in times.items()}
    # 2. Known tokens: the dataset's, and drawn prompts. Their time is 1, and their loss does not count
    seeds = [example_seed(*key, position) for position in positions]
    real, known = labels != -100, None
    if prompts_from_labels:
        known = ~real if attention_mask is None else ~real & attention_mask.bool()
    if prompt_fraction > 0:
        prompts = draw_known_masks(seeds, real, max_length, prompt_fraction, prompt_kinds)
        known = prompts if known is None else known | prompts
    if known is not None:
        labels = labels.masked_fill(known, -100)
        if prompt_dropout > 0:
            uniforms = torch.tensor([np.random.default_rng([seed, _DROPOUT]).random() for seed in seeds])
            is_dropped = (uniforms < prompt_dropout).to(device, non_blocking=True)
            input_ids = input_ids.masked_fill(known & is_dropped[:, None], pad_token_id)
        times = {name: None if tau is None else times_with_known(tau, known) for name, tau in times.items()}
    return FlowBatch(input_ids, labels, **times, attention_mask=attention_mask, noise_seeds=seeds, groups=drawn.groups)


def stratified_uniforms(num_points: int, num_dimensions: int, *key: int) -> torch.FloatTensor:
    """
    Draws uniform random points in [0, 1)^d that are stratified in every coordinate (a Latin hypercube): each of `num_points`
    equal intervals has one, in random order.

    Args:
        num_points (`int`): Number of points.
        num_dimensions (`int`): Number of coordinates, d.
        key (`int`): Seeds of the points.

    Returns:
        `torch.FloatTensor` of shape `(num_points, num_dimensions)`, on the CPU.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    columns = [generator.permutation(num_points) + generator.random(num_points) for _ in range(num_dimensions)]
    return torch.from_numpy(np.stack(columns, axis=1) / num_points).float().clamp(max=_BELOW_ONE)


def low_discrepancy_uniforms(first: int, num_points: int, num_dimensions: int) -> torch.FloatTensor:
    """
    Returns points `first` to `first + num_points - 1` of a fixed sequence whose parts all fill [0, 1)^d evenly: the
    Kronecker sequence of powers of the generalized golden ratio.

    Returns:
        `torch.FloatTensor` of shape `(num_points, num_dimensions)`, on the CPU.
    """
    ratio = 1.5
    for _ in range(50):  # the root of x^(d + 1) = x + 1
        ratio = (1 + ratio) ** (1 / (num_dimensions + 1))
    steps = ratio ** -torch.arange(1, num_dimensions + 1, dtype=torch.float64)
    index = torch.arange(first, first + num_points, dtype=torch.float64)
    return ((index[:, None] + 0.5) * steps % 1).float().clamp(max=_BELOW_ONE)


def draw_prompt_uniforms(seed: int, num_uniforms: int) -> np.ndarray:
    """Draws uniform random numbers below 1 that decide about the known tokens of an example."""
    return np.minimum(np.random.default_rng([seed, _PROMPTS]).random(num_uniforms).astype(np.float32), _BELOW_ONE)


def draw_known_masks(
    seeds: Sequence[int],
    real: torch.BoolTensor,
    max_length: int,
    fraction: float,
    prompt_kinds: Sequence[str] = PROMPT_KINDS[:3],
) -> torch.BoolTensor:
    """
    Draws which tokens of each example are known. For a prefix (`"prefix"`), the context of a gap (`"infill"`) and a random
    subset (`"random"`), at least one token is known and at least one is not, and every number of known tokens is equally
    likely. For `"independent"`, each token is known with a probability that is uniform for the example, so that all or none may
    be known. For `"confident"` no token is known yet, see [`commit_confident`].

    Args:
        seeds (`Sequence[int]`): One seed per example.
        real (`torch.BoolTensor` of shape `(len(seeds), length)`): Positions of tokens, without padding.
        max_length (`int`): Length of the longest sequence of the training, so that padding does not change the result.
        fraction (`float`): Fraction of the examples with known tokens.
        prompt_kinds (`Sequence[str]`): Patterns to draw from, equally likely.

    Returns:
        `torch.BoolTensor` of the shape of `real`, and on its device.
    """
    uniforms = np.stack([draw_prompt_uniforms(seed, 4 + max_length) for seed in seeds])
    uniforms = torch.from_numpy(uniforms).to(real.device, non_blocking=True)
    prompt_draw, kind_draw, size, place = uniforms[:, :4, None].unbind(dim=1)
    num_tokens = real.sum(dim=1, keepdim=True)
    rank = real.cumsum(dim=1) - 1  # position among the example's tokens
    num_chosen = 1 + (size * (num_tokens - 1)).floor()
    start = (place * (num_tokens - num_chosen + 1)).floor()
    is_prefix = rank < num_chosen
    is_context = (rank < start) | (rank >= start + num_chosen)
    token_uniforms = uniforms[:, 4 : 4 + real.shape[1]].masked_fill(~real, 1.0)
    masks = {
        "prefix": is_prefix,
        "infill": is_context,
        "random": token_uniforms.argsort(dim=1).argsort(dim=1) < num_chosen,
        "independent": token_uniforms < size,
        "confident": torch.zeros_like(real),
    }
    known = torch.zeros_like(real)
    for index, name in enumerate(prompt_kinds):
        is_drawn = (kind_draw >= index / len(prompt_kinds)) & (kind_draw < (index + 1) / len(prompt_kinds))
        known |= is_drawn & masks[name]
    return known & real & (prompt_draw < fraction) & (num_tokens > 1)


def example_seed(*key: int) -> int:
    """Returns the seed of an example from a key such as (seed, step, position)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def draw_noise(seeds: Sequence[int], *size: int, device: torch.device) -> torch.FloatTensor:
    """
    Draws standard normal noise for each example from its own seed.

    Args:
        seeds (`Sequence[int]`): One seed per example.
        size (`int`): Shape of the noise of one example.
        device (`torch.device`): Device to draw on. Devices draw different numbers.

    Returns:
        `torch.FloatTensor` of shape `(len(seeds), *size)`.
    """
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), *size, device=device)
    for row, seed in zip(noise, seeds):
        row.normal_(generator=generator.manual_seed(seed))
    return noise
