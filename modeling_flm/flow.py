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


def noise_size(*embeddings: torch.Tensor) -> int:
    """
    The number of Gaussian variables per token that [`JointNoise`] takes.

    Args:
        embeddings (`torch.Tensor` of shape `(vocab_size, embedding_size)`): One or several token embeddings.

    Returns:
        `int`: the joint width of the embeddings or the size of the vocabulary, whichever is smaller.
    """
    return min(embeddings[0].shape[0], sum(embedding.shape[1] for embedding in embeddings))


# Rows of the embeddings that are in float64 at a time.
_ROWS = 2048


class _NoiseFactor(torch.autograd.Function):
    r"""\\(C^{-1} A^\top E\\), whose value is known, as a function of \\(E\\)."""

    @staticmethod
    def forward(ctx, embedding: torch.Tensor, value: torch.Tensor, cholesky: torch.Tensor, *joint: torch.Tensor):
        ctx.save_for_backward(cholesky, *joint)
        return value.to(embedding)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        cholesky, *joint = ctx.saved_tensors
        inner = torch.linalg.solve_triangular(cholesky.mT, gradient.to(cholesky), upper=True)
        if len(joint) == 1:
            product = joint[0] @ inner.to(joint[0])
        else:  # where embeddings nearly coincide, large terms cancel
            rows = zip(*(embedding.to(inner.device).split(_ROWS) for embedding in joint))
            product = torch.cat([torch.cat(parts, dim=1).to(inner) @ inner for parts in rows])
        return product.to(gradient), *(None for _ in range(2 + len(joint)))


class JointNoise:
    r"""
    One noise for several networks. For \\(\varepsilon \sim N(0, I_K)\\), the states
    \\(\varepsilon R_1, \varepsilon R_2, \dots\\), with the factors \\(R_i\\) that `factor` returns, have jointly the
    distribution of \\(x_0 E_1, x_0 E_2, \dots\\) for *one* V-dimensional \\(x_0 \sim N(0, I_V)\\).

    Let \\(A = [E_1 | E_2 | \dots]\\), held constant, and \\(C C^\top = A^\top A\\). Then
    \\(R_i = C^{-1} A^\top E_i\\): in value a block of \\(C^\top\\), and differentiable in \\(E_i\\), with a gradient that
    is the conditional expectation of the V-dimensional one given the noisy state, hence unbiased and less noisy. Where
    the vocabulary is not larger than the joint width, \\(R_i = E_i\\) and the noise has V dimensions.

    What costs time is done here, once for as long as no embedding changes.

    Args:
        embeddings (`torch.Tensor` of shape `(vocab_size, embedding_size)`):
            One or several token embeddings over one vocabulary. They may coincide.
    """

    def __init__(self, *embeddings: torch.Tensor):
        if len({embedding.shape[0] for embedding in embeddings}) != 1:
            shapes = ", ".join(str(tuple(embedding.shape)) for embedding in embeddings)
            raise ValueError(f"`embeddings` must share one vocabulary, got shapes {shapes}.")
        self.size = noise_size(*embeddings)
        dtypes = (torch.promote_types(embedding.dtype, torch.float32) for embedding in embeddings)
        self.embeddings = [embedding.detach().to(dtype) for embedding, dtype in zip(embeddings, dtypes)]
        self.cholesky = None
        if self.size == embeddings[0].shape[0]:
            return
        # Coinciding or tiny embeddings need float64, which MPS lacks.
        first = embeddings[0].device
        device = torch.device("cpu") if first.type == "mps" else first
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            gram = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
            for parts in zip(*(embedding.to(device).split(_ROWS) for embedding in self.embeddings)):
                joint = torch.cat([part.double() for part in parts], dim=1)
                gram.addmm_(joint.T, joint)
            # Keeps the factorization defined where embeddings coincide; its effect is below float32 rounding.
            tiny = 1e-10 * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
            # Without a check, which would wait for the device: what fails becomes NaN.
            self.cholesky, failed = torch.linalg.cholesky_ex(gram + torch.diag(tiny.expand(self.size)))
            self.cholesky = torch.where(failed == 0, self.cholesky, torch.nan)
            values = torch.linalg.solve_triangular(self.cholesky, gram, upper=False)
        self.values = values.split([embedding.shape[1] for embedding in embeddings], dim=1)

    def factor(self, index: int, embedding: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        The factor \\(R_i\\) of one network.

        Args:
            index (`int`): Which of the embeddings, i.
            embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`, *optional*):
                The embedding itself, to differentiate in. Without it the factor is a constant.

        Returns:
            `torch.Tensor` of shape `(noise_size, embedding_size)`.
        """
        embedding = self.embeddings[index] if embedding is None else embedding
        if self.cholesky is None:
            return embedding
        return _NoiseFactor.apply(embedding, self.values[index], self.cholesky, *self.embeddings)
