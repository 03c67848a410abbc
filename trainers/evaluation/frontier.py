# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Quality against diversity: the perplexity that texts have at the entropy of reference texts, along a sweep of temperatures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import resampled_ratios
from .metric import total_entropies, total_losses


def _interpolate(entropies: np.ndarray, values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """
    Interpolates values at the target entropies, linearly between neighboring temperatures. NaN where no two neighbors bracket the
    target. Where several pairs do, the pair with the highest temperatures counts.

    Args:
        entropies (`np.ndarray` of shape `(num_curves, num_temperatures)`): Entropies by increasing temperature.
        values (`np.ndarray` of the shape of `entropies`): Values to interpolate.
        target (`np.ndarray` of shape `(num_curves,)`): Target entropies.
    """
    result = np.full(len(target), np.nan)
    for index in range(entropies.shape[1]):
        here = entropies[:, index]
        result = np.where(here == target, values[:, index], result)
        if index + 1 < entropies.shape[1]:
            after = entropies[:, index + 1]
            with np.errstate(invalid="ignore", divide="ignore"):
                share = (target - here) / (after - here)
            between = (target - here) * (target - after) < 0
            value = values[:, index] + share * (values[:, index + 1] - values[:, index])
            result = np.where(between, value, result)
    return result


def _means(result: Mapping[str, Any], indices: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns entropy and log-perplexity in each resample, of shape `(num_resamples,)`, or in one with every text once."""
    indices = np.arange(len(result["token_counts"]))[None] if indices is None else indices
    return resampled_ratios(*total_entropies(result), indices), resampled_ratios(*total_losses(result), indices)


def perplexity_at_entropy(
    temperatures: Sequence[float],
    results: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any] | float,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """
    Returns the generative perplexity at the entropy of reference texts. It is interpolated between the two neighboring temperatures
    whose entropies bracket the reference's, with the log-perplexity linear in the entropy. Nothing is extrapolated.

    Args:
        temperatures (`Sequence[float]`): The temperatures, at least one.
        results (`Sequence[Mapping[str, Any]]`):
            The row of [`score`] at each temperature, with `perplexities`, `token_counts` and `entropies`.
        reference (`Mapping[str, Any]` or `float`): The row of the reference texts; or an entropy in nats, such as a published one.
        num_resamples (`int`, *optional*, defaults to 1000):
            Number of resamples of texts and reference texts for the interval. Texts with the same index at different temperatures
            are resampled together, since they start from the same noise.

    Returns:
        `dict[str, Any]`: `entropy` of the reference; `gen_ppl`, its 95 % `gen_ppl_interval` and the `temperature` at that entropy, all
        `None` if the frontier does not reach it; `entropies`, the smallest and the largest of the frontier; and `reached`, the share
        of resamples whose frontier reaches the entropy. The interval is over these resamples, and `None` if `reached` is below 0.95.
    """
    if len(temperatures) != len(results) or len(results) == 0:
        raise ValueError(
            f"`temperatures` has {len(temperatures)} values, but `results` {len(results)}: pass one of each."
        )
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    order = np.argsort(temperatures)
    temperatures = np.array(temperatures, dtype=float)[order]
    curve = [results[index] for index in order]
    sizes = [len(result["token_counts"]) for result in curve]
    rng = np.random.default_rng(0)
    uniforms = rng.random((num_resamples, max(sizes)))  # shared by all temperatures
    indices = [(uniforms[:, :size] * size).astype(int) for size in sizes]
    if isinstance(reference, Mapping):
        size = len(reference["token_counts"])
        target, _ = _means(reference)
        targets, _ = _means(reference, (rng.random((num_resamples, size)) * size).astype(int))
    else:
        target, targets = np.array([float(reference)]), np.full(num_resamples, float(reference))

    entropies, log_ppl = (np.stack(values, axis=1) for values in zip(*map(_means, curve)))
    (value,) = _interpolate(entropies, log_ppl, target)
    (temperature,) = _interpolate(entropies, temperatures[None], target)
    draws = (np.stack(values, axis=1) for values in zip(*map(_means, curve, indices)))
    resampled = _interpolate(*draws, targets)
    reached = float(np.isfinite(resampled).mean())
    found = math.isfinite(value)
    interval = None
    if found and reached >= 0.95:
        interval = np.exp(np.nanquantile(resampled, [0.025, 0.975])).tolist()
    return {
        "entropy": float(target[0]),
        "gen_ppl": math.exp(value) if found else None,
        "gen_ppl_interval": interval,
        "temperature": float(temperature) if found else None,
        "entropies": [float(entropies.min()), float(entropies.max())],
        "reached": reached,
    }


def find_frontiers(
    rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], num_resamples: int = 1000
) -> list[dict[str, Any]]:
    """Returns [`perplexity_at_entropy`] for each `num_steps` and `sampler` of rows of [`score`] with a `temperature`."""
    curves: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row.get("num_steps"), row.get("sampler")), []).append(row)
    results = []
    for curve in curves.values():
        names = {name: curve[0][name] for name in ("num_steps", "sampler") if name in curve[0]}
        temperatures = [row["temperature"] for row in curve]
        results.append(names | perplexity_at_entropy(temperatures, curve, reference, num_resamples))
    return results
