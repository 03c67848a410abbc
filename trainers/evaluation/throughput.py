# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""How fast texts are written, by batch size."""

import time
from collections.abc import Callable, Sequence

import torch


def measure_throughput(
    write: Callable[[int], int], batch_sizes: Sequence[int], min_seconds: float = 1.0, min_repeats: int = 3
) -> list[dict[str, float | None]]:
    """
    Texts and tokens a second for each batch size: the median of several batches, after one to warm up.

    Args:
        write (`Callable[[int], int]`):
            Writes a batch with so many texts, and returns the number of their tokens when these are on the host.
        batch_sizes (`Sequence[int]`): How many texts to write at a time.
        min_seconds (`float`, *optional*, defaults to 1.0): How long to write at least, with each batch size.
        min_repeats (`int`, *optional*, defaults to 3): How many batches to write at least.

    Returns:
        `list[dict[str, float | None]]`: with `batch_size`, `texts_per_second` and `tokens_per_second`, which are `None` where
        memory does not suffice.
    """
    rows = []
    for batch_size in batch_sizes:
        try:
            write(batch_size)
            rates = []
            start = time.perf_counter()
            while len(rates) < min_repeats or time.perf_counter() - start < min_seconds:
                before = time.perf_counter()
                num_tokens = write(batch_size)
                seconds = time.perf_counter() - before
                rates.append((batch_size / seconds, num_tokens / seconds))
            texts, tokens = sorted(rates)[len(rates) // 2]
        except torch.OutOfMemoryError:
            texts = tokens = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows.append({"batch_size": batch_size, "texts_per_second": texts, "tokens_per_second": tokens})
    return rows
