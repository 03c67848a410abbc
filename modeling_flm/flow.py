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
The mathematics of flow-based language models as pure functions.

A text is a (length, vocab_size) matrix `x1` of one-hot rows. Noise `x0 ~ N(0, I)` is carried to it along
`I_t = (1 - t) x0 + t x1`. Networks see a state `x` only through `x @ E`, where `E` is their token embedding, and every
update of the state is linear in `x`, so the whole process runs in embedding space: here a *state* is the
(..., embedding_size) tensor `x @ E`, and no function holds a tensor with `vocab_size` columns.
"""

import torch


def _like(times: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """
    Append axes to `times` (batch_size,) until it broadcasts against `state` (batch_size, ...). They have the precision of
    the state, but at least float32: a low-precision state becomes one of float32 instead.
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    return times.to(dtype).reshape(times.shape + (1,) * (state.dim() - times.dim()))


def interpolate(noise: torch.Tensor, clean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    The stochastic interpolant \\(I_t = (1 - t)\,x_0 + t\,x_1\\).

    Args:
        noise (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state of pure noise.
        clean (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state of the data.
        t (`torch.Tensor` of shape `(batch_size,)`): Interpolant times, 0 for noise and 1 for data.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`: The noisy state.
    """
    t = _like(t, clean)
    return (1 - t) * noise + t * clean


def flow_map(state: torch.Tensor, delta: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    The flow map in terms of the two-time denoiser, \\(X_{s,t}(x) = \frac{1-t}{1-s}\,x + \frac{t-s}{1-s}\,\delta_{s,t}(x)\\).

    With the denoiser \\(D_s\\) of a flow in the place of \\(\delta_{s,t}\\) this is an Euler step of its probability flow.

    Args:
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state at time `s`.
        delta (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`):
            The expected embedding of the clean tokens, `delta_{s,t} @ E`.
        s (`torch.Tensor` of shape `(batch_size,)`): Interpolant times to start from.
        t (`torch.Tensor` of shape `(batch_size,)`): Interpolant times to arrive at, `s <= t <= 1`.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`: The state at time `t`.
    """
    # X_{s,s} is the identity, also at s = 1 where the quotient is 0 / 0.
    keep = torch.where(t > s, (1 - t) / (1 - s).clamp(min=torch.finfo(s.dtype).tiny), 1.0)
    keep = _like(keep, state)
    return keep * state + (1 - keep) * delta


def hold(state: torch.Tensor, clean: torch.Tensor, known_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Clamps known positions to their clean state, at whatever time the others are.

    Args:
        state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The state.
        clean (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): A state that is clean there.
        known_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): Where tokens are known.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`.
    """
    return state if known_mask is None else torch.where(known_mask[..., None], clean, state)


def gamma_coefficients(t: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    The coefficients of gamma sampling, by which a flow map arrives at time \\(t\\) with a part of its noise drawn anew: it
    goes on to the later time \\(u = 1 - (1-t)\sqrt{1-\gamma^2}\\), and

    \\(x_t = X_{s,u}(x) - (u - t)\,\delta_{s,u}(x) + \gamma\,(1 - t)\,z\\)

    with new noise \\(z\\) has as much of the text and of noise as \\(t\\) asks for. (The distribution is kept exactly where
    \\(\delta\\) is the text itself, or gamma is 0 or 1.)

    Args:
        t (`torch.Tensor`): Interpolant times to arrive at.
        gamma (`float`): The share \\(\gamma\\) in [0, 1], 0 for none and 1 for all of the noise (in standard deviations).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: \\(u\\), \\(u - t\\) and \\(\gamma\,(1 - t)\\), each with the shape
        of `t`.
    """
    kept = (1 - gamma**2) ** 0.5
    return 1 - (1 - t) * kept, (1 - t) * (1 - kept), gamma * (1 - t)


def semigroup_weight(s: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    r"""
    The weight of the semigroup identity of the two-time denoiser,
    \\(\delta_{s,t}(x) = \lambda\,\delta_{s,u}(x) + (1-\lambda)\,\delta_{u,t}(X_{s,u}(x))\\) with
    \\(\lambda = \frac{(1-t)(u-s)}{(1-u)(t-s)}\\).

    Args:
        s (`torch.Tensor` of shape `(batch_size,)`): Interpolant times to start from.
        u (`torch.Tensor` of shape `(batch_size,)`): Intermediate times, `s <= u <= t` and `u < 1`.
        t (`torch.Tensor` of shape `(batch_size,)`): Interpolant times to arrive at, `s < t <= 1`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: λ, in [0, 1].
    """
    return (1 - t) * (u - s) / ((1 - u) * (t - s))


def project_to_simplex(x: torch.Tensor) -> torch.Tensor:
    """
    The nearest point of the probability simplex (sparsemax).

    Args:
        x (`torch.Tensor` of shape `(..., vocab_size)`): Any values.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: nonnegative values that sum to 1.
    """
    ordered = x.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (rank * ordered > excess).sum(dim=-1, keepdim=True).clamp(min=1)  # not 0 for NaNs
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0)
