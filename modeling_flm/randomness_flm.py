# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Random numbers of generation, which do not depend on how samples are batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .joint_noise import JointNoise


# Indices of samples -> new states of noise, of shape `(num_indices, length, embedding_size)`
NoiseSource = Callable[[list[int]], torch.Tensor]


@dataclass
class Randomness:
    """
    Random numbers of a batch. Every sample has a generator of its own.

    Args:
        samples (`list[int]`): The indices of the samples of the batch.
        generators (`list[torch.Generator]`): A generator for each sample. `None` for the global generator of the device.
        length (`int`): The number of tokens of a sample.
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding of the states.
        factor (`torch.Tensor` of shape `(noise_size, embedding_size)`, *optional*):
            Projects independent normal variables to states of noise. Not needed with a `noise_source`.
        noise_source (`Callable[[list[int]], torch.Tensor]`, *optional*): The argument of [`~FLMGenerationMixin.generate`].
    """

    samples: list[int]
    generators: list[torch.Generator | None]
    length: int
    embedding: torch.Tensor
    factor: torch.Tensor | None = None
    noise_source: NoiseSource | None = None

    def __getitem__(self, rows: list[int]) -> Randomness:
        generators = [self.generators[row] for row in rows] if self.generators else []
        return replace(self, samples=[self.samples[row] for row in rows], generators=generators)

    def pad(self, size: int) -> Randomness:
        """Repeats the first sample up to `size` samples, without using its generator."""
        missing = size - len(self.samples)
        generators = self.generators + [torch.Generator(each.device) for each in self.generators[:1] * missing]
        return replace(self, samples=self.samples + self.samples[:1] * missing, generators=generators)

    def start(self, prior_state: torch.Tensor | None, draws_more: bool) -> tuple[torch.Tensor, Randomness]:
        """
        Returns the first states, and the random numbers of all that follows.

        Args:
            prior_state (`torch.Tensor` of shape `(num_samples, length, embedding_size)`, *optional*):
                States of all samples of the call, instead of noise.
            draws_more (`bool`): Whether random numbers are needed after the start.
        """
        states, generators = [], []
        # Sample by sample, so that a shared generator gives the same numbers for every batch size
        for row, sample in enumerate(self.samples):
            states.append(
                self[[row]].noise() if prior_state is None else prior_state[sample : sample + 1].to(self.embedding)
            )
            if draws_more:
                generator = self.generators[row]
                device = self.embedding.device if generator is None else generator.device
                seed = torch.randint(2**62, (), generator=generator, device=device)
                generators.append(torch.Generator(device).manual_seed(int(seed)))
        return torch.cat(states), replace(self, generators=generators)

    def noise(self) -> torch.Tensor:
        """Draws states of pure noise, of shape `(batch_size, length, embedding_size)`."""
        if self.noise_source is not None:
            states = self.noise_source(self.samples)
            check_state("noise_source", states, (len(self.samples), self.length, self.embedding.shape[1]))
            return states.to(self.embedding)
        noise = []
        for generator in self.generators:
            device = self.embedding.device if generator is None else generator.device
            noise.append(torch.randn(self.length, len(self.factor), generator=generator, device=device))
        with torch.autocast(self.embedding.device.type, enabled=False):
            return torch.stack(noise).to(self.embedding.device) @ self.factor

    def uniforms(self) -> torch.Tensor:
        """Draws uniform variables of shape `(batch_size, length)`."""
        uniforms = [torch.rand(self.length, generator=each, device=each.device) for each in self.generators]
        return torch.stack(uniforms).to(self.embedding.device)


def check_state(name: str, state: torch.Tensor, shape: tuple[int, int, int]):
    """Raises a `ValueError` for a state of a wrong shape, or with values that are not finite."""
    if tuple(state.shape) != shape:
        raise ValueError(
            f"`{name}` must have the shape (num_samples, length, embedding_size), here {shape}, got {tuple(state.shape)}. "
            "Project one-hot noise by `noise @ model.state_embedding`."
        )
    if not torch.compiler.is_compiling() and not torch.isfinite(state).all():
        raise ValueError(f"`{name}` has values that are not finite.")


def get_noise_factor(model: PreTrainedModel, embedding: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """
    Returns the factor of the noise of states, which the model caches while the embedding does not change.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding of the states.
        sizes (`list[int]`): The number of columns of each network.

    Returns:
        `torch.Tensor` of shape `(noise_size, embedding_size)`.
    """
    fingerprint = embedding.sum(dim=0)
    known = None if model._noise_factor is None else model._noise_factor[0].to(embedding.device)
    if known is None or not torch.equal(known, fingerprint):
        noise = JointNoise(*embedding.split(sizes, dim=1))
        factor = torch.cat([noise.factor(index) for index in range(len(sizes))], dim=1)
        if not torch.isfinite(factor).all():
            raise ValueError("The token embedding of the model has values that are not finite.")
        model._noise_factor = (fingerprint, factor)
    return model._noise_factor[1].to(embedding.device)
