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
"""
Times and noise of training examples.

Both are functions of the seed, the step and the position of an example in the global batch. So a run does not depend on
how the global batch is spread over processes and accumulation steps, and a resumed run continues as if uninterrupted.
"""

from collections.abc import Sequence

import numpy as np
import torch


def stratified_times(num_times: int, *key: int) -> torch.FloatTensor:
    """
    Uniform random times in [0, 1), one in each of `num_times` equal intervals, in random order.

    Args:
        num_times (`int`): The number of times.
        key (`int`): What the times are a function of.

    Returns:
        `torch.FloatTensor` of shape `(num_times,)`, on the CPU.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
    times = (generator.permutation(num_times) + generator.random(num_times)) / num_times
    # Rounding to float32 must not reach 1, where there is no noise left.
    return torch.from_numpy(times).float().clamp(max=1 - 2**-24)


def evenly_spread_times(first: int, num_times: int) -> torch.FloatTensor:
    """
    Terms `first` to `first + num_times - 1` of a fixed sequence (of Kronecker, with the golden ratio) that fills [0, 1)
    evenly whichever stretch of it is taken.

    Returns:
        `torch.FloatTensor` of shape `(num_times,)`, on the CPU.
    """
    golden_ratio = (5**0.5 - 1) / 2
    index = torch.arange(first, first + num_times, dtype=torch.float64)
    return ((index + 0.5) * golden_ratio % 1).float().clamp(max=1 - 2**-24)


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
