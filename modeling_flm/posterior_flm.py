# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Posterior distributions of the clean tokens, computed one chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch


# Probabilities of shape (batch_size, num_positions, vocab_size) and their positions -> a tensor of shape
# (batch_size, num_positions, ...)
Reader = Callable[[torch.Tensor, slice], torch.Tensor]


def times_of(tau: torch.Tensor, chunk: slice) -> torch.Tensor:
    """
    Times of a chunk of positions.

    Args:
        tau (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): The times.
        chunk (`slice`): The positions.

    Returns:
        `torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_positions)`.
    """
    return tau if tau.dim() == 1 else tau[:, chunk]


def mean_embedding(embedding: torch.Tensor) -> Reader:
    """
    Reads the expected embedding of the clean tokens, `delta @ E`.

    Args:
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding E.
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        # States are updated in the precision of the embedding, whatever precision the networks run in
        with torch.autocast(probabilities.device.type, enabled=False):
            return probabilities @ embedding.to(probabilities.device)

    return read


def most_likely(probabilities: torch.Tensor, chunk: slice) -> torch.LongTensor:
    """Reads the most likely tokens."""
    return probabilities.argmax(dim=-1)


def entropy(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Reads the entropies of the distributions, in nats. Values below 0, as for [`drawn`], count as 0."""
    return -torch.xlogy(probabilities, probabilities.clamp(min=0)).sum(dim=-1)


def probability_of(read_tokens: Reader) -> Reader:
    """
    Reads the probability of the tokens that `read_tokens` selects.

    Args:
        read_tokens (`Callable[[torch.Tensor, slice], torch.Tensor]`): [`most_likely`], or the result of [`drawn`].
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        return probabilities.gather(-1, read_tokens(probabilities, chunk).unsqueeze(-1)).squeeze(-1)

    return read


def first_probability(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Reads the probability of token 0: a cheap test for NaNs, since softmax makes the whole row NaN."""
    return probabilities[..., 0]


def drawn(uniforms: torch.Tensor) -> Reader:
    """
    Reads tokens drawn from the distributions by inverting their cumulative sums, so that a sample does not depend on its
    batch. Values below 0, of a combination that leaves the simplex, count as 0.

    Args:
        uniforms (`torch.Tensor` of shape `(batch_size, sequence_length)`): Uniform variables in [0, 1), one for each token.
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.LongTensor:
        sums = probabilities.clamp(min=0).cumsum(dim=-1)
        total = sums[..., -1:]
        # Stay below the total despite rounding, so that a token of probability 0 is never drawn
        below = torch.nextafter(total, torch.zeros_like(total))
        levels = torch.minimum(uniforms[:, chunk, None].to(sums) * total, below)
        return torch.searchsorted(sums, levels, right=True).squeeze(-1).clamp(max=sums.shape[-1] - 1)

    return read


class Posterior:
    r"""
    The two-time denoiser \\(\delta_{s,t}(x)\\) of a batch: for every position, a distribution over the clean tokens, or a
    combination of several, which may leave the simplex. Computed again at each reading, one chunk of positions at a time, so
    that no tensor with `vocab_size` columns outlives a chunk.

    Args:
        probabilities (`Callable[[slice], torch.Tensor]`):
            Computes the probabilities of a chunk of positions, of shape `(batch_size, num_positions, vocab_size)`.
        chunks (`list[slice]`): The chunks, see [`~utils_flm.chunks`].
        device (`torch.device`): The device of the results.
    """

    def __init__(self, probabilities: Callable[[slice], torch.Tensor], chunks: list[slice], device: torch.device):
        self.probabilities = probabilities
        self.chunks = chunks
        self.device = device

    @classmethod
    def of_tokens(cls, tokens: torch.LongTensor, vocab_size: int, chunks: list[slice]) -> Posterior:
        """
        A one-hot posterior at `tokens`.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens. -100 counts as 0.
            vocab_size (`int`): The size of the vocabulary.
            chunks (`list[slice]`): The chunks of positions.
        """
        zeros = torch.zeros(1, 1, 1, device=tokens.device).expand(*tokens.shape, vocab_size)

        def one_hot(chunk: slice) -> torch.Tensor:
            # `torch.nn.functional.one_hot` would wait for the device to check the labels
            return zeros[:, chunk].scatter(-1, tokens[:, chunk, None].clamp(min=0), 1.0)

        return cls(one_hot, chunks, tokens.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Iterates over chunks of probabilities."""
        return map(self.probabilities, self.chunks)

    def read(self, *readers: Reader) -> tuple[torch.Tensor, ...]:
        """
        Applies several readers, computing each chunk only once.

        Args:
            readers (`Callable[[torch.Tensor, slice], torch.Tensor]`):
                [`most_likely`], [`first_probability`], [`entropy`], the results of [`mean_embedding`], [`drawn`] and [`probability_of`], or
                any other function of probabilities and their positions.

        Returns:
            `tuple[torch.Tensor, ...]`: For each reader, a tensor of shape `(batch_size, sequence_length, ...)`.
        """
        readings = [[] for _ in readers]
        for chunk in self.chunks:
            probabilities = self.probabilities(chunk)
            for reader, parts in zip(readers, readings):
                parts.append(reader(probabilities, chunk))
        return tuple(torch.cat(parts, dim=1).to(self.device) for parts in readings)

    def mean(self, embedding: torch.Tensor) -> torch.Tensor:
        """Expected embedding of the clean tokens, of shape `(batch_size, sequence_length, embedding_size)`."""
        return self.read(mean_embedding(embedding))[0]

    def argmax(self) -> torch.LongTensor:
        """Most likely tokens, of shape `(batch_size, sequence_length)`."""
        return self.read(most_likely)[0]

    def confidence(self) -> torch.Tensor:
        """Probabilities of the most likely tokens, of shape `(batch_size, sequence_length)`."""
        return self.read(probability_of(most_likely))[0]

    def draw(self, uniforms: torch.Tensor) -> torch.LongTensor:
        """Tokens drawn from the distributions, of shape `(batch_size, sequence_length)`, see [`drawn`]."""
        return self.read(drawn(uniforms))[0]

    def dense(self) -> torch.Tensor:
        """The full probabilities, of shape `(batch_size, sequence_length, vocab_size)`. Materializes the vocabulary: for rewards and tests."""
        return torch.cat([probabilities.to(self.device) for probabilities in self], dim=1)

    def map(self, function: Reader) -> Posterior:
        """Applies `function` to every chunk of probabilities and its positions."""

        def mapped_probabilities(chunk: slice) -> torch.Tensor:
            return function(self.probabilities(chunk), chunk)

        return Posterior(mapped_probabilities, self.chunks, self.device)

    def combine(
        self, other: Posterior, function: Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
    ) -> Posterior:
        """Applies `function` to every chunk of this and another posterior, and its positions."""

        def combined_probabilities(chunk: slice) -> torch.Tensor:
            own = self.probabilities(chunk)
            return function(own, other.probabilities(chunk).to(own.device), chunk)

        return Posterior(combined_probabilities, self.chunks, self.device)

    def within(self, context: Callable[[], AbstractContextManager]) -> Posterior:
        """Returns this posterior with every chunk computed inside a context, such as autocast."""

        def probabilities_in_context(chunk: slice) -> torch.Tensor:
            with context():
                return self.probabilities(chunk)

        return Posterior(probabilities_in_context, self.chunks, self.device)
