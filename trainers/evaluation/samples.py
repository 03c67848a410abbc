# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Texts of a model for evaluation, the same however many processes share the work."""

import torch
from transformers import PreTrainedModel

from modeling_flm import FLMGenerationOutput

from ..batches import example_seed


# Streams of random numbers that must not meet, beside those of the trainers.
SAMPLES_STREAM = 2


def generate_samples(
    model: PreTrainedModel, indices: list[int], seed: int, **kwargs
) -> torch.LongTensor | FLMGenerationOutput:
    """
    The texts with the given numbers of an evaluation. Each has noise of its own, so that neither batches nor processes
    change it.

    Args:
        model ([`~transformers.PreTrainedModel`]): A model with the `generate` of this library.
        indices (`list[int]`): The numbers of the texts.
        seed (`int`): The seed of the evaluation.
        kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_steps` and `batch_size`.

    Returns:
        `torch.LongTensor` of shape `(len(indices), length)`, on the CPU; or what `generate` returns with
        `return_dict_in_generate=True`.
    """
    if not indices:
        return torch.empty((0, 0), dtype=torch.long)
    generators = [torch.Generator().manual_seed(example_seed(seed, SAMPLES_STREAM, index)) for index in indices]
    output = model.generate(num_samples=len(indices), generator=generators, **kwargs)
    return output.cpu() if isinstance(output, torch.Tensor) else output
