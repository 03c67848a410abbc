# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What several files share: chunks of positions, evaluation mode, and a limit of `torch.compile`."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging


# How many probabilities are made at a time: 330 tokens at V = 50k on a CPU, where they should stay near the caches, and
# 1300 on a GPU, which takes larger matrices to be busy.
CHUNK_ELEMENTS = {"cpu": 2**24, "default": 2**26}


def chunks(batch_size: int, length: int, vocab_size: int, device: torch.device) -> list[slice]:
    """
    Chunks of the positions of a batch, such that probabilities over the vocabulary can be held for one of them.

    Args:
        batch_size (`int`): The number of sequences.
        length (`int`): The number of positions of each.
        vocab_size (`int`): The size of the vocabulary.
        device (`torch.device`): Where the probabilities are to be.

    Returns:
        `list[slice]`: the chunks, which follow each other.
    """
    budget = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["default"])
    size = max(1, budget // (batch_size * vocab_size))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within this context networks have no dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_evaluation_mode(method: Callable) -> Callable:
    """A method of a model that runs without dropout, in the model and in what networks it is passed."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with evaluating(self, *(value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))):
            return method(self, *args, **kwargs)

    return run


def raise_recompile_limit():
    """Lets `torch.compile` keep as many graphs of one function as several networks, shapes and modes come to."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


# Seconds before a progress bar appears. Most batches are finished by then.
PROGRESS_DELAY = 2


def progress(number: int, unit: str) -> Iterable[int]:
    """Iterates over the steps or rounds of a batch, with a progress bar if they take long."""
    options = {"desc": f"{unit.capitalize()}s", "unit": unit, "delay": PROGRESS_DELAY, "leave": None}
    return range(number) if number == 1 else logging.tqdm(range(number), **options)
