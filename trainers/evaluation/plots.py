# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of an evaluation, and what plots of the examples share: intervals of shares, and plain numbers on log axes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axis import Axis


def check_plots():
    """Raises an `ImportError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need `pip install modeling-flm[evaluate]`.") from error


def share_interval(share: float, num_samples: int, z: float = 1.96) -> tuple[float, float]:
    """
    Returns Wilson's confidence interval of a share of independent samples. It has a positive width at 0 and 1 as well.

    Args:
        share (`float`): The share, from 0 to 1.
        num_samples (`int`): Number of samples.
        z (`float`, *optional*, defaults to 1.96): Width in standard deviations; 1.96 gives 95 %.

    Returns:
        `tuple[float, float]`: the two ends of the interval.
    """
    if not 0 <= share <= 1 or num_samples < 1:
        raise ValueError(f"`share` must be from 0 to 1 and `num_samples` at least 1, got {share} and {num_samples}.")
    center = (share + z**2 / (2 * num_samples)) / (1 + z**2 / num_samples)
    variance = share * (1 - share) / num_samples + z**2 / (4 * num_samples**2)
    half = z * math.sqrt(variance) / (1 + z**2 / num_samples)
    # The share stays inside, despite rounding
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def share_errors(shares: list[float], num_samples: int) -> list[list[float]]:
    """Returns the lengths of the intervals below and above the shares, in percent, as matplotlib's `yerr`."""
    ends = [share_interval(share, num_samples) for share in shares]
    below = [100 * (share - low) for share, (low, _) in zip(shares, ends)]
    return [below, [100 * (high - share) for share, (_, high) in zip(shares, ends)]]


def plain_log_ticks(axis: "Axis"):
    """
    Puts ticks such as 0.2, 0.5 and 20 instead of powers of ten on a logarithmic axis with its final limits.

    Args:
        axis (`matplotlib.axis.Axis`): `axes.xaxis` or `axes.yaxis`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    # Less than a decade has too few ticks at 1, 2 and 5 times a power of ten.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def is_finite(value: float | None) -> bool:
    """Whether a figure of a row exists: some do not, such as the perplexity of empty texts."""
    return value is not None and math.isfinite(value)


def plot(rows: Sequence[Mapping[str, Any]], path: str | Path):
    """
    Plots generative perplexity, entropy and, if there is one, the share of texts that pass a check against the time per text, if
    there are generated texts.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Rows of [`score`]. The row with `source` "reference" becomes a line.
        path (`str` or `Path`): File of the plot.
    """
    from matplotlib.figure import Figure  # not pyplot, which may need a screen

    measured = [row for row in rows if "seconds_per_text" in row and is_finite(row["gen_ppl"])]
    if not measured:
        return
    panels = [("gen_ppl", "generative perplexity", 1), ("entropy", "entropy (nats)", 1)]
    if all("passed" in row for row in rows):
        panels.append(("passed", "texts that pass the check (%)", 100))
    figure = Figure(figsize=(4.5 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels))
    for axis, (name, label, factor) in zip(axes, panels):
        times, values = [row["seconds_per_text"] for row in measured], [factor * row[name] for row in measured]
        intervals = factor * np.array([row[f"{name}_interval"] for row in measured])
        errors = np.abs(intervals.T - np.array(values))
        axis.errorbar(times, values, yerr=errors, marker="o", capsize=3)
        for row, x, y in zip(measured, times, values):
            axis.annotate(f" {row.get('num_steps', '')}", (x, y), textcoords="offset points", xytext=(4, 4))
        for row in rows:
            if row.get("source") == "reference" and is_finite(row[name]):
                axis.axhline(factor * row[name], linestyle="--", color="gray", label="reference")
                axis.legend()
        axis.set(xscale="log", xlabel="seconds per text (numbers: steps)", ylabel=label)
        axis.margins(0.12)  # for the numbers of steps
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for axis in (axes[0].yaxis, *(each.xaxis for each in axes)):
        plain_log_ticks(axis)
    figure.suptitle(f"{measured[0]['num_texts']} texts; bars: 95 % intervals", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: str | Path):
    """
    Plots generative perplexity against entropy: a curve for each sampler and number of steps, and reference texts as a point.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Rows with `gen_ppl` and `entropy`, and optionally `gen_ppl_interval`, `entropy_interval`, `temperature`, `sampler`,
            `num_steps`, and `label`, the name of the curve. The row with `source` "reference" is the point.
        path (`str` or `Path`): File of the plot.
    """
    from matplotlib.figure import Figure  # not pyplot, which may need a screen

    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("source") != "reference" and is_finite(row["gen_ppl"]):
            curves.setdefault(row.get("label") or _curve_name(row), []).append(row)
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
        if row.get("source") == "reference" and is_finite(row["gen_ppl"]):
            axes.plot([row["entropy"]], [row["gen_ppl"]], "k*", markersize=11, label="reference")
            axes.axvline(row["entropy"], color="gray", linestyle="--", linewidth=0.7)
    axes.set(yscale="log", xlabel="entropy (nats; numbers: temperature)", ylabel="generative perplexity")
    plain_log_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _curve_name(row: Mapping[str, Any]) -> str:
    """Returns sampler and number of steps of a row."""
    parts = [row["sampler"]] if "sampler" in row else []
    parts += [f"{row['num_steps']} step{'s' if row['num_steps'] > 1 else ''}"] if "num_steps" in row else []
    return ", ".join(parts) or row.get("source", "texts")
