# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of ratios, by resampling texts with replacement."""

import math
from collections.abc import Callable

import numpy as np


def resampled_ratios(numerators: np.ndarray, denominators: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns the ratio of sums in each resample, from the texts' `indices` of shape `(num_resamples, num_texts)`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return numerators[indices].sum(axis=1) / denominators[indices].sum(axis=1)


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    num_resamples: int = 1000,
    function: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[float, list[float]]:
    """
    Returns a ratio of sums over texts, such as a mean or a share, and its 95 % confidence interval.

    Args:
        numerators (`np.ndarray` of shape `(num_texts,)`): A numerator for each text.
        denominators (`np.ndarray` of shape `(num_texts,)`): A denominator for each text.
        num_resamples (`int`, *optional*, defaults to 1000): Number of bootstrap resamples.
        function (`Callable`, *optional*): Applied to every ratio, such as `np.exp` for a perplexity.

    Returns:
        `tuple[float, list[float]]`: the ratio and the two ends of its interval; NaN if all denominators are 0.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_flm.trainers.evaluation import bootstrap_ratio

    >>> share, (low, high) = bootstrap_ratio(np.array([1, 1, 0, 1]), np.ones(4))
    >>> share, low < share <= high
    (0.75, True)
    ```
    """
    number = len(numerators)
    resamples = np.random.default_rng(0).integers(number, size=(num_resamples, number))
    ratios = [resampled_ratios(numerators, denominators, each) for each in (np.arange(number)[None], resamples)]
    ratio, resampled = ratios if function is None else map(function, ratios)
    resampled = resampled[~np.isnan(resampled)]
    interval = np.quantile(resampled, [0.025, 0.975]).tolist() if len(resampled) > 0 else [math.nan, math.nan]
    return float(ratio[0]), interval
