# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Which of the tokens that a model has written become known: loops around the sampler write all of a text that is not known, keep
some of it, and write the rest again with what they kept. What is kept is a function of the round, of probabilities and of what
is open; the loop is [`~FLMGenerationMixin.generate`]'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Commitment:
    """
    A rule of which tokens become known after each round. This one is that of generation without rounds: everything is written
    once, and stays.
    """

    num_rounds: int | None = None
    fresh_noise: bool = False
    reads_probabilities = False  # of the tokens that were written

    @property
    def draws_noise(self) -> bool:
        """Whether new noise is drawn on the way."""
        return self.fresh_noise and self.num_rounds > 1

    def due(self, round: int, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        The tokens that this round is about; a text that has none of them is left as it is.

        Args:
            round (`int`): The number of the round, from 0.
            is_open (`torch.BoolTensor` of shape `(num_texts, length)`): Where tokens are not known.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open

    def commit(self, round: int, probabilities: torch.Tensor | None, is_open: torch.BoolTensor) -> torch.BoolTensor:
        """
        The tokens that are known from now on.

        Args:
            round (`int`): The number of the round, from 0.
            probabilities (`torch.Tensor` of shape `(num_texts, length)`, *optional*):
                How likely the written tokens are, if the rule reads that.
            is_open (`torch.BoolTensor` of shape `(num_texts, length)`): Where tokens are not known.

        Returns:
            `torch.BoolTensor` of the shape of `is_open`.
        """
        return is_open


@dataclass
class PosteriorRefinement(Commitment):
    """
    Every round writes what is not known. Tokens that are likely enough become known, and besides, the likeliest of each text up
    to a budget; what is left is written again. After the last round everything stays as it is.

    Args:
        num_rounds (`int`): The number of rounds.
        threshold (`float`, *optional*): The probability that is enough. By default none is.
        budget (`int` or `str`, *optional*):
            How many of the likeliest become known whatever their probability: a number of tokens, `"uniform"` for as many as
            leave equally many to each round, or `None` for none.
        fresh_noise (`bool`): Whether the rest starts from new noise, and not from what it started from before.
    """

    num_rounds: int
    threshold: float | None = None
    budget: int | str | None = "uniform"
    fresh_noise: bool = True

    reads_probabilities = True

    def commit(self, round, probabilities, is_open):
        if round == self.num_rounds - 1:
            return is_open
        chosen = torch.zeros_like(is_open)
        if self.threshold is not None:
            chosen |= probabilities >= self.threshold
        if self.budget is not None:
            num_open = is_open.sum(dim=1, keepdim=True)
            rounds_left = self.num_rounds - round
            budget = (num_open + rounds_left - 1) // rounds_left if self.budget == "uniform" else self.budget
            ordered = probabilities.masked_fill(~is_open, -torch.inf).argsort(dim=1, descending=True, stable=True)
            chosen |= ordered.argsort(dim=1) < budget
        return chosen & is_open


@dataclass
class BlockByBlock(Commitment):
    """
    From left to right, a block at a time: every round writes what is not known up to the end of the text, and its block becomes
    known.

    Args:
        block_length (`int`): The number of tokens of a block.
        length (`int`): The number of tokens of a text.
        fresh_noise (`bool`): Whether the rest starts from new noise, and not from what it started from before.
    """

    block_length: int
    length: int
    fresh_noise: bool = True

    @property
    def num_rounds(self) -> int:
        return -(-self.length // self.block_length)

    def due(self, round, is_open):
        block = torch.zeros_like(is_open)
        block[:, round * self.block_length : (round + 1) * self.block_length] = True
        return is_open & block

    def commit(self, round, probabilities, is_open):
        return self.due(round, is_open)


__all__ = ["BlockByBlock", "Commitment", "PosteriorRefinement"]
