# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Throughput of generation, by batch size."""

import time
from collections.abc import Callable, Sequence

import torch


def measure_throughput(
    generate: Callable[[int], int], batch_sizes: Sequence[int], min_seconds: float = 1.0, min_repeats: int = 3
) -> list[dict[str, float | None]]:
    """
    Measures texts and tokens per second for each batch size: the median of several batches, after one to warm up.

    Args:
        generate (`Callable[[int], int]`):
            Generates a batch of the given size and returns its number of tokens, once these are on the host.
        batch_sizes (`Sequence[int]`): The batch sizes.
        min_seconds (`float`, *optional*, defaults to 1.0): Shortest time to measure each batch size for.
        min_repeats (`int`, *optional*, defaults to 3): Smallest number of batches to measure.

    Returns:
        `list[dict[str, float | None]]`: `batch_size`, `texts_per_second` and `tokens_per_second`. The rates are `None` if memory
        runs out.
    """
    rows = []
    for batch_size in batch_sizes:
        try:
            generate(batch_size)
            rates = []
            start = time.perf_counter()
            while len(rates) < min_repeats or time.perf_counter() - start < min_seconds:
                before = time.perf_counter()
                num_tokens = generate(batch_size)
                seconds = time.perf_counter() - before
                rates.append((batch_size / seconds, num_tokens / seconds))
            texts, tokens = sorted(rates)[len(rates) // 2]
        except torch.OutOfMemoryError:
            texts = tokens = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows.append({"batch_size": batch_size, "texts_per_second": texts, "tokens_per_second": tokens})
    return rows
