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
