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
"""One Gaussian noise for several networks, drawn in embedding space."""

import torch


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
