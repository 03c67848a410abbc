# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Reparameterized time `tau`: the rescaled probability of recognizing a noised token, as a function of interpolant time `t`."""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedConfig

from .utils_flm import is_traced


# The table is uniform in a = t / (1 - t), the signal-to-noise ratio of the interpolant: in it the map is smooth, and the
# integral below is a convolution. At a = 16 the error rate is below 1e-16 for every vocabulary up to 10 million tokens, by
# the union bound (V - 1) Φ(-a / √2). Beyond |z| = 9 a normal density has 2e-19 of its mass. The step is small enough for the
# accuracy of 1e-5 that tests check against quadrature.
_STEP = 1 / 64
_A_MAX = 16.0
_Z_MAX = 9.0


def _hermite(x: torch.Tensor, knots: torch.Tensor, values: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Cubic Hermite interpolation of (`knots`, `values`, `slopes`) at `x`; `x` must lie within the knots."""
    right = torch.searchsorted(knots, x, right=True).clamp(1, knots.numel() - 1)
    left = right - 1
    width = knots[right] - knots[left]
    u = (x - knots[left]) / width
    rise = values[right] - values[left]
    correction = (1 - u) * (slopes[left] * width - rise) - u * (slopes[right] * width - rise)
    return values[left] + u * rise + u * (1 - u) * correction


class IdentityTime:
    """No reparameterization: `tau` is the interpolant time `t`. Has the methods of [`ReparameterizedTime`]."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def tau_to_t(self, tau: torch.Tensor) -> torch.Tensor:
        """Returns `tau`."""
        return _check_floating_point("tau", tau)

    def t_to_tau(self, t: torch.Tensor) -> torch.Tensor:
        """Returns `t`."""
        return _check_floating_point("t", t)

    def dtau_dt(self, t: torch.Tensor) -> torch.Tensor:
        """Returns 1 for every time."""
        return torch.ones_like(_check_floating_point("t", t))


def _check_floating_point(name: str, value: torch.Tensor) -> torch.Tensor:
    if not torch.is_floating_point(value):
        raise TypeError(f"`{name}` must be a floating point tensor, got {value.dtype}.")
    return value


_TABLES: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}


@functools.lru_cache
def _get_knots(vocab_size: int) -> list[list[float]]:
    """Calls `_build_table` in another thread, because tensors have no values in some modes of torch, which belong to a thread."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(_build_table, vocab_size).result()


def _build_table(vocab_size: int) -> list[list[float]]:
    """
    Returns the knots `a`, `tau(a)` and `dtau/da`.

    With n = vocab_size - 1 competing tokens, 1 - P(a) = ∫ φ(z) (1 - Φ(z + a)^n) dz. The trapezoid rule converges
    exponentially for this integrand, and knots in `a` that share the grid of `z` make it a product with a Hankel matrix.
    """
    z = torch.arange(-_Z_MAX, _Z_MAX + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
    a = torch.arange(0.0, _A_MAX + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
    weights = torch.exp(-0.5 * z**2)
    weights = weights / weights.sum()

    y = torch.arange(z.numel() + a.numel() - 1, dtype=torch.float64, device="cpu") * _STEP - _Z_MAX  # every z + a
    log_cdf = torch.special.log_ndtr(y)
    competitors = vocab_size - 1
    miss = -torch.expm1(competitors * log_cdf)
    density = torch.exp(-0.5 * y**2 + (competitors - 1) * log_cdf) * competitors / (2 * torch.pi) ** 0.5

    scale = vocab_size / competitors
    tau = 1 - scale * (miss.unfold(0, z.numel(), 1) @ weights)
    tau[0] = 0.0  # P(0) = 1/V exactly
    slope = scale * (density.unfold(0, z.numel(), 1) @ weights)
    # For large a, tau rounds to 1: keep the knots where it still increases.
    rising = int((tau.diff() > 0).long().cumprod(0).sum()) + 1
    return [x[:rising].tolist() for x in (a, tau, slope)]


class ReparameterizedTime:
    r"""
    Map between the reparameterized time `tau`, on which networks are conditioned and which is drawn uniformly, and the
    interpolant time `t` (paper, section on time reparameterization):

    \\(\tau(t) = \frac{V}{V-1}\left(P(t) - \frac{1}{V}\right), \quad
    P(t) = \int \varphi(z)\, \Phi\!\left(z + \tfrac{t}{1-t}\right)^{V-1} dz\\)

    where \\(P(t)\\) is the probability that the largest entry of a noised one-hot vector is the right one. Both
    directions are monotone and exact to 1e-5; 0 maps to 0 and 1 to 1. Values are computed on the device of the argument, in
    float64 (on MPS in float32, with less precision near 1), from a table that is built once per vocabulary size and device.
    An instance holds no tensors that saving, loading or moving a model could lose.

    Args:
        vocab_size (`int`): Vocabulary size V, at least 2.

    Example:

    ```python
    >>> time = ReparameterizedTime(vocab_size=50258)
    >>> time.tau_to_t(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.8087, 1.0000])
    ```
    """

    def __init__(self, vocab_size: int):
        if vocab_size < 2:
            raise ValueError(f"`vocab_size` must be at least 2, got {vocab_size}.")
        self.vocab_size = vocab_size
        self._knots = _get_knots(vocab_size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _prepare(self, name: str, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = _check_floating_point(name, value)
        key = (self.vocab_size, value.device)
        is_plain = type(value) is torch.Tensor  # others are fake, or belong to a program that is exported
        table = _TABLES.get(key) if is_plain else None
        if table is None:
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            table = tuple(torch.tensor(knots, dtype=dtype, device=value.device) for knots in self._knots)
            if is_plain and not is_traced():
                _TABLES[key] = table
        a, tau, slope = table
        return value.to(a.dtype).clamp(0, 1), a, tau, slope

    def tau_to_t(self, tau: torch.Tensor) -> torch.Tensor:
        """
        Args:
            tau (`torch.Tensor` of any shape): Reparameterized times in [0, 1].

        Returns:
            `torch.Tensor` of the shape and dtype of `tau`: the interpolant times `t` in [0, 1].
        """
        x, a_knots, tau_knots, slopes = self._prepare("tau", tau)
        a = _hermite(x, tau_knots, a_knots, 1 / slopes)
        t = torch.where(x < 1, a / (1 + a), 1.0)
        return t.to(tau.dtype)

    def t_to_tau(self, t: torch.Tensor) -> torch.Tensor:
        """
        Args:
            t (`torch.Tensor` of any shape): Interpolant times in [0, 1].

        Returns:
            `torch.Tensor` of the shape and dtype of `t`: the reparameterized times `tau` in [0, 1].
        """
        x, a_knots, tau_knots, slopes = self._prepare("t", t)
        a = (x / (1 - x)).clamp(max=a_knots[-1])  # 1 / 0 is inf; beyond the last knot tau is 1
        return torch.where(x < 1, _hermite(a, a_knots, tau_knots, slopes), 1.0).to(t.dtype)

    def dtau_dt(self, t: torch.Tensor) -> torch.Tensor:
        """
        Returns the chain-rule factor between derivatives in `t` and in `tau`.

        Args:
            t (`torch.Tensor` of any shape): Interpolant times in [0, 1].

        Returns:
            `torch.Tensor` of the shape and dtype of `t`: `dtau/dt`, which vanishes at `t = 1`.
        """
        x, a_knots, tau_knots, slopes = self._prepare("t", t)
        a = (x / (1 - x)).clamp(max=a_knots[-1])
        # The slope is a density in `a`: interpolate its logarithm, which is nearly a parabola.
        right = torch.searchsorted(a_knots, a, right=True).clamp(1, a_knots.numel() - 1)
        u = (a - a_knots[right - 1]) / (a_knots[right] - a_knots[right - 1])
        slope = torch.exp(torch.lerp(slopes[right - 1].log(), slopes[right].log(), u))
        return torch.where(x / (1 - x) < a_knots[-1], slope / (1 - x) ** 2, 0.0).to(t.dtype)


TimeMap = ReparameterizedTime | IdentityTime


def build_time_map(config: PreTrainedConfig) -> TimeMap:
    """
    Returns the map between reparameterized and interpolant times of a configuration.

    Args:
        config ([`FLMConfig`]): The configuration.
    """
    if config.time_reparameterization is None:
        return IdentityTime()
    return ReparameterizedTime(config.vocab_size)


def translate_tau(tau: torch.Tensor, source: TimeMap, target: TimeMap) -> torch.Tensor:
    """
    Converts reparameterized times of one model into reparameterized times of another, for equal interpolant times.

    Args:
        tau (`torch.Tensor` of any shape): Reparameterized times of one model.
        source (`ReparameterizedTime` or `IdentityTime`): Time map of that model.
        target (`ReparameterizedTime` or `IdentityTime`): Time map of the other model.

    Returns:
        `torch.Tensor` of the shape of `tau`.
    """
    # Compare representations: classes loaded as remote code are different objects.
    return tau if repr(source) == repr(target) else target.t_to_tau(source.tau_to_t(tau))
