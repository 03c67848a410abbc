# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""One Gaussian noise for several networks, drawn in embedding space."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


def noise_size(*embeddings: torch.Tensor) -> int:
    """
    Returns the number of Gaussian variables per token for a [`JointNoise`].

    Args:
        embeddings (`torch.Tensor` of shape `(vocab_size, embedding_size)`): One or several token embeddings.

    Returns:
        `int`: the total width of the embeddings, or the vocabulary size if smaller.
    """
    return min(embeddings[0].shape[0], sum(embedding.shape[1] for embedding in embeddings))


# Number of rows that are summed in float32; the sums are added in float64. Rounding errors grow with more rows.
_ROWS = 4096
# Columns of the Gram matrix per product. Fewer columns compute less on both sides of its diagonal, but in slower products.
_COLUMNS = 384


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Context for full-precision float32 matrix products, with autocast, TF32 and bfloat16 disabled."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, allowed):
            backend.fp32_precision = precision


# For each embedding: the index of the previous embedding of equal width, and a vector with 1 for each similar column, else 0;
# `None` if there is no such embedding.
SimilarColumns = list[tuple[int, torch.Tensor] | None]


def _find_similar(embeddings: Sequence[torch.Tensor]) -> SimilarColumns:
    """Finds the columns of each embedding that are similar to a previous embedding's, on a sample of rows."""
    samples = [each[:: max(1, len(each) // _ROWS)].to(embeddings[0].device) for each in embeddings]
    similar, last = [], {}
    for index, sample in enumerate(samples):
        other = last.get(sample.shape[1])
        last[sample.shape[1]] = index
        if other is None:
            similar.append(None)
            continue
        # No branch here: it would synchronize with the device.
        is_similar = (sample - samples[other]).norm(dim=0) < sample.norm(dim=0) / 4
        similar.append((other, is_similar.to(sample)))
    return similar


def _basis(embeddings: Sequence[torch.Tensor], similar: SimilarColumns) -> Iterator[torch.Tensor]:
    """Yields A' in chunks of rows."""
    for parts in zip(*(embedding.split(_ROWS) for embedding in embeddings)):
        parts = [part.to(parts[0].device) for part in parts]
        columns = [part if each is None else part - each[1] * parts[each[0]] for part, each in zip(parts, similar)]
        yield columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _undo_differences(columns: torch.Tensor, widths: list[int], similar: SimilarColumns) -> list[torch.Tensor]:
    """Adds subtracted columns back: values per column of A' (see [`JointNoise`]) become values per column of each embedding."""
    sums = []
    for part, each in zip(columns.split(widths, dim=-1), similar):
        sums.append(part if each is None else part + each[1].to(part.device) * sums[each[0]])
    return sums


class _NoiseFactor(torch.autograd.Function):
    r"""
    \\(C^{-1} A'^\top E\\), with a known value, and rows of \\(E\\), as functions of \\(E\\). One function for both, because the
    gradient of rows alone would be another matrix as large as \\(E\\).
    """

    @staticmethod
    def forward(
        ctx,
        embedding: torch.Tensor,
        input_ids: torch.Tensor,
        value: torch.Tensor,
        cholesky: torch.Tensor,
        similar: SimilarColumns,
        *joint,
    ):
        ctx.save_for_backward(input_ids, cholesky, *joint)
        ctx.similar = similar
        return value.to(embedding), F.embedding(input_ids, embedding)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, rows_gradient: torch.Tensor):
        input_ids, cholesky, *joint = ctx.saved_tensors
        inner = gradient.to(cholesky.device).to(cholesky.dtype)  # device first: MPS has no float64
        inner = torch.linalg.solve_triangular(cholesky.mT, inner, upper=True)
        product, start = None, 0
        with _full_precision(joint[0].device):
            for rows in _basis(joint, ctx.similar):
                if product is None:  # as large as an embedding: concatenating parts would take long
                    product = rows.new_empty(len(joint[0]), inner.shape[1])
                torch.mm(rows, inner.to(rows), out=product[start : start + len(rows)])
                start += len(rows)
        product = product.to(gradient)
        product.index_put_((input_ids,), rows_gradient.to(product), accumulate=True)
        return product, *(None for _ in range(4 + len(joint)))


class JointNoise:
    r"""
    One noise for several networks. For \\(\varepsilon \sim N(0, I_K)\\), the states
    \\(\varepsilon R_1, \varepsilon R_2, \dots\\), with the factors \\(R_i\\) that `factor` returns, have jointly the
    distribution of \\(x_0 E_1, x_0 E_2, \dots\\) for *one* V-dimensional \\(x_0 \sim N(0, I_V)\\).

    Let \\(A = [E_1 | E_2 | \dots]\\), held constant, with an orthonormal basis \\(Q = A' C^{-\top}\\) of its columns. Then
    \\(R_i = Q^\top E_i\\), differentiable in \\(E_i\\), with a gradient that is the conditional expectation of the
    V-dimensional one given the noisy states, hence unbiased and less noisy. Where the vocabulary is not larger than the
    total width, \\(R_i = E_i\\) and the noise has V dimensions.

    Here \\(A'\\) is A with similar columns of \\(E_i\\) and \\(E_{i-1}\\) replaced by their difference, and
    \\(C C^\top = A'^\top A'\\): for one embedding \\(R = C^\top\\). The constructor does the expensive work, so use one instance
    as long as no embedding changes. Products are in float32, their sums and the factorization in float64. Precision: the
    variance of a column of \\(A'\\) grows by a factor \\(1 + 5 \cdot 10^{-7}\\), or \\(1 + 4 \cdot 10^{-6}\\) if columns are
    linearly dependent up to rounding, so covariances of states are right to \\(10^{-5}\\) of the variances. The difference
    between states of nearly equal embeddings is right up to float32 rounding; this does not hold for parts of *one*
    embedding, so pass the parts of a concatenation.

    Args:
        embeddings (`torch.Tensor` of shape `(vocab_size, embedding_size)`):
            One or several token embeddings over one vocabulary. They may coincide.
        frozen (`Sequence[int]`, *optional*, defaults to `()`):
            Indices of embeddings that never change. They come first, in this order.
        frozen_gram (`torch.Tensor` of shape `(frozen_size, frozen_size)`, *optional*):
            The attribute `frozen_gram` of an earlier noise with the same `frozen` embeddings, to save its computation.
    """

    def __init__(self, *embeddings: torch.Tensor, frozen: Sequence[int] = (), frozen_gram: torch.Tensor | None = None):
        if len({embedding.shape[0] for embedding in embeddings}) != 1:
            shapes = ", ".join(str(tuple(embedding.shape)) for embedding in embeddings)
            raise ValueError(f"`embeddings` must share one vocabulary, got shapes {shapes}.")
        self.size = noise_size(*embeddings)
        self._owners: list[PreTrainedModel] = []  # for each embedding, see `of_networks`
        dtypes = [torch.promote_types(embedding.dtype, torch.float32) for embedding in embeddings]
        self.embeddings = [embedding.detach().to(dtype) for embedding, dtype in zip(embeddings, dtypes)]
        self.cholesky, self.frozen_gram = None, frozen_gram
        if self.size == embeddings[0].shape[0]:
            return
        order = [*frozen, *(index for index in range(len(embeddings)) if index not in frozen)]
        self._joint = [self.embeddings[index] for index in order]
        widths = [embedding.shape[1] for embedding in self._joint]
        with torch.no_grad(), _full_precision(self._joint[0].device):
            self._similar = _find_similar(self._joint)
            gram = self._gram(sum(widths[: len(frozen)]))
            # The share of a column's variance is above the rounding errors of products; `tiny` is for columns of zeros.
            eps = max(1e-11, *(torch.finfo(dtype).eps for dtype in dtypes))
            diagonal = gram.diagonal()
            tiny = (
                eps**3 * torch.cat(_undo_differences(diagonal, widths, self._similar))
                + torch.finfo(torch.float32).tiny
            )
            # No check here: it would synchronize with the device. If both factorizations fail, the result is NaN.
            self.cholesky = torch.full_like(gram, torch.nan)
            for relative in (32 * eps, 4 * eps):
                cholesky, failed = torch.linalg.cholesky_ex(gram + torch.diag(relative * diagonal + tiny))
                self.cholesky = torch.where(failed == 0, cholesky, self.cholesky)
        self.values = dict(zip(order, _undo_differences(self.cholesky.mT, widths, self._similar)))

    @classmethod
    def of_networks(
        cls,
        *networks: PreTrainedModel,
        frozen: PreTrainedModel | None = None,
        frozen_gram: torch.Tensor | None = None,
    ) -> "JointNoise":
        """
        Returns the noise of all embeddings of one or several models, for `make_state` of each of them.

        Args:
            networks ([`~transformers.PreTrainedModel`]): Models over one vocabulary, each with `embeddings`.
            frozen ([`~transformers.PreTrainedModel`], *optional*): The model of `networks` whose embeddings never change.
            frozen_gram (`torch.Tensor`, *optional*): As for the class.
        """
        owners = [network for network in networks for _ in network.embeddings]
        weights = [network.embed_vocabulary(each) for network in networks for each in network.embeddings]
        frozen_indices = [index for index, owner in enumerate(owners) if owner is frozen]
        noise = cls(*weights, frozen=frozen_indices, frozen_gram=frozen_gram)
        noise._owners = owners
        return noise

    def indices_of(self, network: PreTrainedModel) -> list[int]:
        """Returns the indices of the embeddings of one of the models that this noise was made for by `of_networks`."""
        indices = [index for index, owner in enumerate(self._owners) if owner is network]
        if not indices:
            raise ValueError("The noise was not made for this model: pass it to `JointNoise.of_networks`.")
        return indices

    def _gram(self, frozen_size: int) -> torch.Tensor:
        """Returns the Gram matrix of the basis."""
        # MPS has no float64: only products are computed there.
        first = self._joint[0].device
        device = torch.device("cpu") if first.type == "mps" else first
        gram = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        blocks = [*range(0, frozen_size, _COLUMNS), *range(frozen_size, self.size, _COLUMNS), self.size]
        if self.frozen_gram is not None:
            gram[:frozen_size, :frozen_size] = self.frozen_gram
            blocks = [start for start in blocks if start >= frozen_size]
        for rows in _basis(self._joint, self._similar):
            for left, right in zip(blocks, blocks[1:]):
                gram[:right, left:right] += (rows[:, :right].mT @ rows[:, left:right]).to(device)
        self.frozen_gram = gram[:frozen_size, :frozen_size].clone()
        return gram.triu() + gram.triu(1).mT

    def factor(self, index: int) -> torch.Tensor:
        r"""
        Returns the factor \\(R_i\\) of one embedding, without gradient.

        Args:
            index (`int`): Index i of the embedding.

        Returns:
            `torch.Tensor` of shape `(noise_size, embedding_size)`.
        """
        return self.embeddings[index] if self.cholesky is None else self.values[index].to(self.embeddings[index])

    def coordinates(self) -> torch.Tensor | None:
        r"""
        Returns the clean tokens in the coordinates of the noise: the basis \\(Q\\), with \\(E_i = Q R_i\\).

        Returns:
            `torch.Tensor` of shape `(vocab_size, noise_size)`, or `None` if it is the identity, because the noise has
            `vocab_size` dimensions.
        """
        if self.cholesky is None:
            return None
        basis = torch.cat([*_basis(self._joint, self._similar)]).to(self.cholesky)
        return torch.linalg.solve_triangular(self.cholesky, basis.mT, upper=False).mT.to(self.embeddings[0])

    def factor_and_tokens(
        self, index: int, embedding: torch.Tensor, input_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Returns the factor \\(R_i\\) of one embedding and the embedded tokens, both differentiable in the embedding.

        Args:
            index (`int`): Index i of the embedding.
            embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the factor, of shape `(noise_size, embedding_size)`, and the embedded
            tokens, of shape `(batch_size, sequence_length, embedding_size)`.
        """
        if self.cholesky is None:
            return embedding, F.embedding(input_ids, embedding)
        values = (self.values[index], self.cholesky, self._similar, *self._joint)
        return _NoiseFactor.apply(embedding, input_ids, *values)
