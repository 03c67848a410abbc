# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The predicted distributions of the clean tokens, made a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch


# Probabilities of shape (batch_size, num_positions, vocab_size), and which positions they are of -> anything of shape
# (batch_size, num_positions, ...)
Reader = Callable[[torch.Tensor, slice], torch.Tensor]


def times_of(tau: torch.Tensor, chunk: slice) -> torch.Tensor:
    """
    The times of a chunk of positions.

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
        # Updates of the state are in the precision of the embedding, whatever precision the networks run in.
        with torch.autocast(probabilities.device.type, enabled=False):
            return probabilities @ embedding.to(probabilities.device)

    return read


def most_likely(probabilities: torch.Tensor, chunk: slice) -> torch.LongTensor:
    """Reads the most likely tokens."""
    return probabilities.argmax(dim=-1)


def probability_of(read_tokens: Reader) -> Reader:
    """
    Reads how likely tokens are that are read likewise.

    Args:
        read_tokens (`Callable[[torch.Tensor, slice], torch.Tensor]`): [`most_likely`], or [`drawn`] with its variables.
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
        return probabilities.gather(-1, read_tokens(probabilities, chunk).unsqueeze(-1)).squeeze(-1)

    return read


def first_probability(probabilities: torch.Tensor, chunk: slice) -> torch.Tensor:
    """Reads how likely the token 0 is, which is not finite where distributions are not."""
    return probabilities[..., 0]


def drawn(uniforms: torch.Tensor) -> Reader:
    """
    Reads tokens drawn from the distributions, by the inverse of their cumulative sums: so a text does not depend on the others
    of its batch. Where a combination leaves the simplex, what is below 0 counts as 0.

    Args:
        uniforms (`torch.Tensor` of shape `(batch_size, sequence_length)`): A uniform variable in [0, 1) for each token.
    """

    def read(probabilities: torch.Tensor, chunk: slice) -> torch.LongTensor:
        sums = probabilities.clamp(min=0).cumsum(dim=-1)
        total = sums[..., -1:]
        # Below the total, also where it is rounded to it: a token of probability 0 is never drawn.
        below = torch.nextafter(total, torch.zeros_like(total))
        levels = torch.minimum(uniforms[:, chunk, None].to(sums) * total, below)
        return torch.searchsorted(sums, levels, right=True).squeeze(-1).clamp(max=sums.shape[-1] - 1)

    return read


class Posterior:
    r"""
    The two-time denoiser \\(\delta_{s,t}(x)\\) of a batch: for every position a distribution of the clean token, or what a
    combination makes of several, which may leave the simplex. It is made anew at each reading, a chunk of positions at a
    time, so that nothing with `vocab_size` columns is held beyond a chunk.

    Args:
        probabilities (`Callable[[slice], torch.Tensor]`):
            From positions to what is said there, of shape `(batch_size, num_positions, vocab_size)`.
        chunks (`list[slice]`): The positions that are read at a time, see [`~utils_flm.chunks`].
        device (`torch.device`): Where readings are to be.
    """

    def __init__(self, probabilities: Callable[[slice], torch.Tensor], chunks: list[slice], device: torch.device):
        self.probabilities = probabilities
        self.chunks = chunks
        self.device = device

    @classmethod
    def of_tokens(cls, tokens: torch.LongTensor, vocab_size: int, chunks: list[slice]) -> Posterior:
        """
        Certainty.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens; -100 counts as 0.
            vocab_size (`int`): The size of the vocabulary.
            chunks (`list[slice]`): The positions that are read at a time.
        """
        zeros = torch.zeros(1, 1, 1, device=tokens.device).expand(*tokens.shape, vocab_size)
        # Not `one_hot`, which waits for the device to check the labels
        one_hot = lambda chunk: zeros[:, chunk].scatter(-1, tokens[:, chunk, None].clamp(min=0), 1.0)  # noqa: E731
        return cls(one_hot, chunks, tokens.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """One chunk of probabilities after the other."""
        return map(self.probabilities, self.chunks)

    def read(self, *readers: Reader) -> tuple[torch.Tensor, ...]:
        """
        Several readings at once, for each of which a chunk is made only once.

        Args:
            readers (`Callable[[torch.Tensor, slice], torch.Tensor]`):
                [`mean_embedding`], [`most_likely`], [`drawn`], [`probability_of`] or others like them.

        Returns:
            `tuple[torch.Tensor, ...]`: for each reader a tensor of shape `(batch_size, sequence_length, ...)`.
        """
        readings = [[] for _ in readers]
        for chunk in self.chunks:
            probabilities = self.probabilities(chunk)
            for reader, parts in zip(readers, readings):
                parts.append(reader(probabilities, chunk))
        return tuple(torch.cat(parts, dim=1).to(self.device) for parts in readings)

    def mean(self, embedding: torch.Tensor) -> torch.Tensor:
        """The expected embedding of the clean tokens, of shape `(batch_size, sequence_length, embedding_size)`."""
        return self.read(mean_embedding(embedding))[0]

    def argmax(self) -> torch.LongTensor:
        """The most likely tokens, of shape `(batch_size, sequence_length)`."""
        return self.read(most_likely)[0]

    def confidence(self) -> torch.Tensor:
        """How likely the most likely tokens are, of shape `(batch_size, sequence_length)`."""
        return self.read(probability_of(most_likely))[0]

    def draw(self, uniforms: torch.Tensor) -> torch.LongTensor:
        """Tokens drawn from the distributions, of shape `(batch_size, sequence_length)`, see [`drawn`]."""
        return self.read(drawn(uniforms))[0]

    def dense(self) -> torch.Tensor:
        """All of it, of shape `(batch_size, sequence_length, vocab_size)`."""
        return torch.cat([probabilities.to(self.device) for probabilities in self], dim=1)

    def map(self, function: Reader) -> Posterior:
        """The posterior that `function` makes of every chunk of probabilities, and of where it is."""
        return Posterior(lambda chunk: function(self.probabilities(chunk), chunk), self.chunks, self.device)

    def combine(
        self, other: Posterior, function: Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
    ) -> Posterior:
        """The posterior that `function` makes of every chunk of this one and another, and of where it is."""

        def probabilities(chunk: slice) -> torch.Tensor:
            own = self.probabilities(chunk)
            return function(own, other.probabilities(chunk).to(own.device), chunk)

        return Posterior(probabilities, self.chunks, self.device)

    def within(self, context: Callable[[], AbstractContextManager]) -> Posterior:
        """The same, read within a context, such as the autocast that it was made in."""

        def probabilities(chunk: slice) -> torch.Tensor:
            with context():
                return self.probabilities(chunk)

        return Posterior(probabilities, self.chunks, self.device)
