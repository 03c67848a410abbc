# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
The mathematics of flow-based language models as pure functions.

A sequence is a (length, vocab_size) matrix `x1` of one-hot rows. The interpolant `I_t = (1 - t) x0 + t x1` connects it to
noise `x0 ~ N(0, I)`. Networks see a state `x` only through `x @ E`, where `E` is their token embedding, and every update of
the state is linear in `x`, so the whole process runs in embedding space: here a *state* is the (..., embedding_size) tensor
`x @ E`, and no function holds a tensor with `vocab_size` columns.

Times have shape `(batch_size,)`, one per sequence, or `(batch_size, sequence_length)`, one per token. A known token has time 1
throughout: its state is clean, and no update moves it, because all factors below are exact and finite at `s = t = 1`.
"""

import torch


def expand_times(times: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """
    Appends axes to times, or to factors of their shape, so that they broadcast against a state.

    Args:
        times (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): The times.
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1 or sequence_length, 1)`, in the precision of the state, but at least float32,
        to which it promotes a low-precision state.
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    return times.to(dtype).reshape(times.shape + (1,) * (state.dim() - times.dim()))


def times_with_known(tau: torch.Tensor, known: torch.BoolTensor | None) -> torch.Tensor:
    """
    Returns the times of sequences with some known tokens.

    Args:
        tau (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
            Times of the unknown tokens.
        known (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): Mask of the known tokens.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length)`, or `tau` itself if nothing is known.
    """
    if known is None:
        return tau
    return torch.where(known, 1.0, tau[:, None] if tau.dim() == 1 else tau)


def interpolate(noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    The stochastic interpolant \\(I_t = (1 - t)\,x_0 + t\,x_1\\).

    Args:
        noise (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state of pure noise.
        clean (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state of the data.
        t (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
            Interpolant times, 0 for noise and 1 for data.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`: The noisy state.
    """
    t = expand_times(t, clean)
    return (1 - t) * noise + t * clean


def remaining_noise(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Share of the noise at time `s` that is left at time `t`, \\(\frac{1-t}{1-s}\\), and 1 for equal times.

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s <= t <= 1`.

    Returns:
        `torch.Tensor` of the shape of `s`, in [0, 1].
    """
    return torch.where(t > s, (1 - t) / (1 - s).clamp(min=torch.finfo(s.dtype).tiny), 1.0)


def flow_map(state: torch.Tensor, delta: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Applies the flow map in terms of the two-time denoiser, \\(X_{s,t}(x) = \frac{1-t}{1-s}\,x + \frac{t-s}{1-s}\,\delta_{s,t}(x)\\).

    With the denoiser \\(D_s\\) of a flow as \\(\delta_{s,t}\\), this is an Euler step of its probability flow.

    Args:
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state at time `s`.
        delta (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`):
            The expected embedding of the clean tokens, `delta_{s,t} @ E`.
        s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s <= t <= 1`.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`: The state at time `t`.
    """
    keep = expand_times(remaining_noise(s, t), state)
    return keep * state + (1 - keep) * delta


def denoising_direction(state: torch.Tensor, denoised: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    r"""
    The drift of the probability flow times \\(1-s\\): \\((1-s)\,\frac{dx}{ds} = D_s(x) - x\\), and 0 where `s = 1`.

    Args:
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state at time `s`.
        denoised (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): `D_s(x) @ E`.
        s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): Interpolant times.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`.
    """
    return torch.where(expand_times(s, state) < 1, denoised - state, 0.0)


def gamma_coefficients(
    t: torch.Tensor, gamma: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Coefficients of gamma sampling, in which a flow map arrives at time \\(t\\) with part of its noise redrawn: it goes to the
    later time \\(u = 1 - (1-t)\sqrt{1-\gamma^2}\\), and

    \\(x_t = X_{s,u}(x) - (u - t)\,\delta_{s,u}(x) + \gamma\,(1 - t)\,z\\)

    with new noise \\(z\\) has the shares of data and noise of time \\(t\\). (The distribution is preserved exactly if
    \\(\delta\\) is the data itself, or gamma is 0 or 1.)

    Args:
        t (`torch.Tensor`): Interpolant times to arrive at.
        gamma (`float` or `torch.Tensor` of the shape of `t`): Share \\(\gamma\\) of the noise to redraw, in standard deviations: 0 for none, 1 for all.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: \\(u\\), \\(u - t\\) and \\(\gamma\,(1 - t)\\), each with the shape
        of `t`.
    """
    kept = (1 - gamma**2) ** 0.5
    return 1 - (1 - t) * kept, (1 - t) * (1 - kept), gamma * (1 - t)


def bridge_coefficients(s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Coefficients of the bridge between a state and a clean token: given both, the state at a time between them is

    \\(x_t = a\,x_s + b\,x_1 + c\,z, \quad a = \frac{s(1-t)^2}{t(1-s)^2}, \quad b = \frac{(t-s)\,q}{t(1-s)^2}, \quad
    c^2 = \frac{(1-t)^2(t-s)\,q}{t^2(1-s)^2}, \quad q = s + t - 2st\\)

    with new noise \\(z\\) (arXiv 2605.13681). They are (1, 0, 0) for equal times.

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s <= t <= 1`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: \\(a\\), \\(b\\) and \\(c\\), each with the shape of `s`.
    """
    tiny = torch.finfo(s.dtype).tiny
    keep, moves = remaining_noise(s, t), t > s
    q = s + t - 2 * s * t
    a = torch.where(moves, s * keep**2 / t.clamp(min=tiny), 1.0)
    b = torch.where(moves, (t - s) * q / (t * (1 - s) ** 2).clamp(min=tiny), 0.0)
    c = torch.where(moves, keep * ((t - s) * q).clamp(min=0).sqrt() / t.clamp(min=tiny), 0.0)
    return a, b, c


def reward_coefficient(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Step size along the gradient of a reward, \\(\frac{(1-s)(t-s)}{t}\\).

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s < t <= 1`, or both 1.

    Returns:
        `torch.Tensor` of the shape of `s`.
    """
    return (1 - s) * (t - s) / t


def correction_coefficient(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Factor of the correction of a two-network flow map, \\(\tfrac12 (t-s)(1-s)\\).

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at.

    Returns:
        `torch.Tensor` of the shape of `s`.
    """
    return 0.5 * (t - s) * (1 - s)


def semigroup_weight(s: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Weight of the semigroup identity of the two-time denoiser,
    \\(\delta_{s,t}(x) = \lambda\,\delta_{s,u}(x) + (1-\lambda)\,\delta_{u,t}(X_{s,u}(x))\\) with
    \\(\lambda = \frac{(1-t)(u-s)}{(1-u)(t-s)}\\), and 1 if the second part is empty.

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        u (`torch.Tensor` of the shape of `s`): Intermediate times, `s <= u <= t`.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `t <= 1`.

    Returns:
        `torch.Tensor` of the shape of `s`: λ, in [0, 1].
    """
    share = torch.where(t > s, (u - s) / (t - s).clamp(min=torch.finfo(s.dtype).tiny), 1.0)
    return remaining_noise(u, t) * share


def lagrangian_coefficient(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Factor \\(\frac{(1-t)(t-s)}{1-s}\\) of the derivative in \\(t\\), in the Lagrangian target.

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s <= t <= 1`.

    Returns:
        `torch.Tensor` of the shape of `s`, 0 for equal times.
    """
    return remaining_noise(s, t) * (t - s)


def eulerian_coefficient(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    Factor \\(\frac{t-s}{1-t}\\) of the derivative along the flow, in the Eulerian target. It has a pole at
    \\(s < t = 1\\).

    Args:
        s (`torch.Tensor` of any shape): Interpolant times to start from.
        t (`torch.Tensor` of the shape of `s`): Interpolant times to arrive at, `s <= t`.

    Returns:
        `torch.Tensor` of the shape of `s`, 0 for equal times.
    """
    return torch.where(t > s, (t - s) / (1 - t), 0.0)
