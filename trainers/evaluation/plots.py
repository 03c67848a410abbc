# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What several plots need: intervals of shares, and logarithmic axes with plain numbers."""

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.axis import Axis


def share_interval(share: float, num_samples: int, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson's interval of a share that was counted in independent samples, which is not empty at 0 and 1 either.

    Args:
        share (`float`): The share, from 0 to 1.
        num_samples (`int`): In how many samples it was counted.
        z (`float`, *optional*, defaults to 1.96): How many standard deviations; 1.96 gives 95 %.

    Returns:
        `tuple[float, float]`: the ends of the interval.
    """
    if not 0 <= share <= 1 or num_samples < 1:
        raise ValueError(f"`share` must be from 0 to 1 and `num_samples` at least 1, got {share} and {num_samples}.")
    center = (share + z**2 / (2 * num_samples)) / (1 + z**2 / num_samples)
    variance = share * (1 - share) / num_samples + z**2 / (4 * num_samples**2)
    half = z * math.sqrt(variance) / (1 + z**2 / num_samples)
    # Rounding must not leave the share outside.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def share_errors(shares: list[float], num_samples: int) -> list[list[float]]:
    """The lengths of these intervals below and above shares, in per cent, as the `yerr` of matplotlib."""
    ends = [share_interval(share, num_samples) for share in shares]
    below = [100 * (share - low) for share, (low, _) in zip(shares, ends)]
    return [below, [100 * (high - share) for share, (_, high) in zip(shares, ends)]]


def plain_log_ticks(axis: "Axis"):
    """
    Ticks like 0.2, 0.5 and 20 in the place of powers of ten, on an axis with a logarithmic scale and its final limits.

    Args:
        axis (`matplotlib.axis.Axis`): `axes.xaxis` or `axes.yaxis`.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    # Within less than a decade there are too few of 1, 2 and 5 times a power of ten.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
