# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Helpers that several files share: chunks of positions, evaluation mode, progress bars, and a limit of `torch.compile`."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging


# Maximum number of probabilities in a chunk: 330 tokens at V = 50k on a CPU, so that they stay in the caches, and 1300 on a
# GPU, which needs larger matrices to be busy. See docs/performance.md; the value for GPUs is not measured.
CHUNK_ELEMENTS = {"cpu": 2**24, "default": 2**26}


def chunks(batch_size: int, length: int, vocab_size: int, device: torch.device) -> list[slice]:
    """
    Splits the positions of a batch into chunks whose probabilities over the vocabulary fit into memory.

    Args:
        batch_size (`int`): The number of sequences.
        length (`int`): The number of positions of a sequence.
        vocab_size (`int`): The size of the vocabulary.
        device (`torch.device`): The device of the probabilities.

    Returns:
        `list[slice]`: Consecutive slices of the position axis; each applies to the whole batch.
    """
    budget = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["default"])
    size = max(1, budget // (batch_size * vocab_size))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Puts networks into evaluation mode within this context, and restores the mode of every module afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def in_evaluation_mode(method: Callable) -> Callable:
    """Decorates a method of a model, which then runs in evaluation mode, along with all networks among its arguments."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with evaluating(self, *(value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))):
            return method(self, *args, **kwargs)

    return run


def raise_recompile_limit():
    """Allows `torch.compile` more graphs of a function, for several networks, shapes and modes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


# Seconds before a progress bar appears. Most batches are finished by then.
PROGRESS_DELAY = 2


def progress(number: int, unit: str) -> Iterable[int]:
    """Iterates over the steps or rounds of a batch, with a progress bar if they take long."""
    options = {"desc": f"{unit.capitalize()}s", "unit": unit, "delay": PROGRESS_DELAY, "leave": None}
    return range(number) if number == 1 else logging.tqdm(range(number), **options)
