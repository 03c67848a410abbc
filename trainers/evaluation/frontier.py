# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Quality against diversity: the frontier over temperatures, and the perplexity that it has at the entropy of reference texts."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bootstrap import resampled_ratios
from .metric import total_entropies, total_losses
from .plots import plain_log_ticks


def _interpolate(entropies: np.ndarray, values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """
    Values at the target entropies, linear between neighbouring temperatures; NaN where no two neighbours have the target
    between them. Where several pairs do, it is the one of the highest temperatures.

    Args:
        entropies (`np.ndarray` of shape `(num_curves, num_temperatures)`): By increasing temperature.
        values (`np.ndarray` of the shape of `entropies`): What to interpolate.
        target (`np.ndarray` of shape `(num_curves,)`): Entropies to be at.
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
    The generative perplexity that texts have at the entropy of reference texts: between the two neighbouring temperatures that
    have it between them, with the logarithm of the perplexity linear in the entropy. Nothing is extrapolated.

    Args:
        temperatures (`Sequence[float]`): The temperatures, at least one.
        results (`Sequence[Mapping[str, Any]]`):
            What [`load_gen_ppl`]'s metric returns of the texts at each: `perplexities`, `token_counts` and `entropies`.
        reference (`Mapping[str, Any]` or `float`): The same of the reference texts; or an entropy in nats, such as a published one.
        num_resamples (`int`, *optional*, defaults to 1000):
            How often texts and reference texts are resampled for the interval. Equally many texts at several temperatures are
            resampled together, since those with the same number begin with the same noise.

    Returns:
        `dict[str, Any]`: `entropy`, that of the reference; `gen_ppl` there, `temperature` there and the 95 %
        `gen_ppl_interval`, all `None` where the frontier does not reach the entropy; `entropies`, the smallest and
        the largest of the frontier; and `reached`, the share of resamples whose frontier reaches the entropy; the interval is that
        of these. If `reached` is below 0.95, an end of the frontier is so near that there is no interval.
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
    uniforms = rng.random((num_resamples, max(sizes)))  # shared: texts with the same number have the same noise
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


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path):
    """
    Generative perplexity against entropy: a curve for each sampler and number of steps, and reference texts as a point.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            With `gen_ppl` and `entropy`, and as far as they are known `gen_ppl_interval`, `entropy_interval`, `temperature`,
            `sampler`, `num_steps`, and `label` for the name of the curve. A row with `source` "reference" is the point.
        path (`str` or `Path`): The picture to write.
    """
    from matplotlib.figure import Figure  # without pyplot, which may want a screen

    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("source") != "reference" and math.isfinite(row["gen_ppl"]):
            curves.setdefault(row.get("label") or curve_name(row), []).append(row)
    figure = Figure(figsize=(6, 4.2))
    axes = figure.subplots()
    for name, points in curves.items():
        points = sorted(points, key=lambda row: row.get("temperature") or 1.0)
        x, y = ([row[key] for row in points] for key in ("entropy", "gen_ppl"))
        errors = {
            f"{axis}err": np.abs(np.array([row[f"{key}_interval"] for row in points]).T - np.array(values))
            for axis, key, values in (("x", "entropy", x), ("y", "gen_ppl", y))
            if all(f"{key}_interval" in row for row in points)
        }
        axes.errorbar(x, y, marker="o", markersize=3, linewidth=1, elinewidth=0.5, label=name, **errors)
        for row in points if len(points) > 1 else []:
            text = f"{row['temperature']:g}"
            axes.annotate(
                text, (row["entropy"], row["gen_ppl"]), textcoords="offset points", xytext=(3, 4), fontsize=6
            )
    for row in rows:
        if row.get("source") == "reference":
            axes.plot([row["entropy"]], [row["gen_ppl"]], "k*", markersize=11, label="reference")
            axes.axvline(row["entropy"], color="gray", linestyle="--", linewidth=0.7)
    axes.set(yscale="log", xlabel="entropy (nats; numbers at points: temperature)", ylabel="generative perplexity")
    plain_log_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def curve_name(row: Mapping[str, Any]) -> str:
    """What the texts of a row are made by, but for the temperature."""
    parts = [row["sampler"]] if "sampler" in row else []
    parts += [f"{row['num_steps']} step{'s' if row['num_steps'] > 1 else ''}"] if "num_steps" in row else []
    return ", ".join(parts) or row.get("source", "texts")
