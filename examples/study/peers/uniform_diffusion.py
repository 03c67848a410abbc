# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
r"""
Uniform-state diffusion (Duo, arXiv 2506.10892) on the network of [`~modeling_flm.FLMModel`], as what flow maps are compared with.

At the level \\(\alpha\\), from 0 for noise to 1 for text, a token is kept with probability \\(\alpha\\), or else is any of the K
tokens. The paper has found that this is the largest entry of a noised one-hot vector, which makes it a neighbour of flow-based
models: \\(\alpha\\) is the reparameterized time \\(\tau\\) of the state that an FLM sees.

The network says what each token would be, \\(x_\theta\\), if its own noised token were not known.
"""

import torch
import torch.nn.functional as F

from modeling_flm import FLMModel
from modeling_flm.time_reparameterization import ReparameterizedTime

from .averaging import AveragedTrainer


# Levels are drawn from within these: at 0 and 1 the loss is finite, but the terms of which it is made are not.
LEVELS = (1e-4, 1 - 1e-4)


def noised_tokens(
    input_ids: torch.LongTensor, levels: torch.Tensor, vocab_size: int, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """
    Draws tokens at levels of noise.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The text.
        levels (`torch.Tensor` of shape `(batch_size, 1)`): With what probability a token is kept.
        vocab_size (`int`): The number of tokens.
        generator (`torch.Generator`, *optional*): The source of the noise, on the CPU.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    kept = torch.rand(input_ids.shape, generator=generator).to(levels) < levels
    return torch.where(kept, input_ids, torch.randint(vocab_size, input_ids.shape, generator=generator).to(input_ids))


def uniform_loss(
    logits: torch.Tensor, input_ids: torch.LongTensor, noised: torch.LongTensor, levels: torch.Tensor
) -> torch.Tensor:
    r"""
    The integrand of the negative variational bound for levels that are uniform in (0, 1), per token. Reversed in time,
    noising is a process whose tokens jump from i to j at the rate \\(\bar x_j / (K \alpha \bar x_i)\\), where
    \\(\bar x = K \alpha x + 1 - \alpha\\). This is the divergence of these jumps from those that the model's
    \\(x_\theta\\) has in the place of the text's x (paper, appendix on the bound).

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Those of the model.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The text.
        noised (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The noised tokens, i.
        levels (`torch.Tensor` of shape `(batch_size, 1)`): The levels.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length)`: in nats.
    """
    vocab_size, levels = logits.shape[-1], levels[..., None]
    x_bar = vocab_size * levels * F.one_hot(input_ids, vocab_size) + 1 - levels
    model_bar = vocab_size * levels * logits.float().softmax(dim=-1) + 1 - levels
    ratio, model_ratio = (each / each.gather(-1, noised[..., None]) for each in (x_bar, model_bar))
    divergence = model_ratio - ratio + ratio * (ratio.log() - model_ratio.log())
    return divergence.sum(dim=-1) / (vocab_size * levels[..., 0])


class UniformDiffusionTrainer(AveragedTrainer):
    """
    Trains a uniform-state diffusion model. For the first part of the training the network sees, in the place of the
    noised tokens, soft ones: a softmax of the Gaussian states whose largest entries the tokens are.

    Args:
        curriculum_fraction (`float`, *optional*, defaults to 0.5): Which part of the training that is.
        curriculum_temperature (`float`, *optional*, defaults to 0.001):
            Of the softmax, for states whose variance would be 1 if the text's were.
    """

    def __init__(self, *args, curriculum_fraction: float = 0.5, curriculum_temperature: float = 1e-3, **kwargs):
        super().__init__(*args, **kwargs)
        self.curriculum_fraction, self.curriculum_temperature = curriculum_fraction, curriculum_temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, vocab_size = inputs["input_ids"], self.accelerator.unwrap_model(model).config.vocab_size
        order = torch.randperm(len(input_ids), device=input_ids.device)  # stratified
        levels = (order + torch.rand(len(input_ids), device=input_ids.device)) / len(input_ids)
        levels = levels.clamp(*LEVELS)[:, None]
        if model.training and self.state.global_step < self.curriculum_fraction * self.state.max_steps:
            t = ReparameterizedTime(vocab_size).tau_to_t(levels)[..., None]
            one_hot = F.one_hot(input_ids, vocab_size)
            state = (t * one_hot + (1 - t) * torch.randn_like(one_hot, dtype=t.dtype)) / (t**2 + (1 - t) ** 2).sqrt()
            noised = state.argmax(dim=-1)
            soft = (state / self.curriculum_temperature).softmax(dim=-1)
            embedding = self.accelerator.unwrap_model(model).state_embedding
            network_inputs = {"inputs_embeds": soft @ embedding}
        else:
            noised = noised_tokens(input_ids, levels, vocab_size)
            network_inputs = {"input_ids": noised}
        logits = model(**network_inputs, timesteps=levels[:, 0]).logits
        is_target = inputs["labels"] != -100
        losses = uniform_loss(logits, input_ids, noised, levels)
        loss = (losses * is_target).sum() / is_target.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


@torch.no_grad()
def uniform_log_likelihood(
    model: FLMModel, input_ids: torch.LongTensor, num_times: int = 32, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    The variational bound of uniform-state diffusion in continuous time: the loss of the training, summed over a text.

    Args:
        model ([`FLMModel`]): A uniform-state diffusion model, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
        num_times (`int`, *optional*, defaults to 32): How often each is noised, at stratified levels; a forward pass each.
        generator (`torch.Generator`, *optional*): The source of levels and noise, on the CPU.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`: lower bounds of the log-likelihoods, in nats.
    """
    vocab_size = model.config.vocab_size
    total = torch.zeros(len(input_ids), device=input_ids.device)
    for stratum in range(num_times):
        levels = (stratum + torch.rand(len(input_ids), 1, generator=generator)).div(num_times).clamp(*LEVELS)
        levels = levels.to(input_ids.device)
        noised = noised_tokens(input_ids, levels, vocab_size, generator)
        logits = model(noised, timesteps=levels[:, 0]).logits
        total += uniform_loss(logits, input_ids, noised, levels).sum(dim=1)
    return -total / num_times


@torch.no_grad()
def uniform_samples(
    model: FLMModel,
    num_samples: int,
    length: int,
    num_steps: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """
    Texts by ancestral sampling: from any tokens, in equal steps of the level, each drawn from what it may be one level on
    given what it is, independently of the others.

    Args:
        model ([`FLMModel`]): A uniform-state diffusion model, in evaluation mode.
        num_samples (`int`): The number of texts.
        length (`int`): Their length, in tokens.
        num_steps (`int`): The number of steps, a forward pass each.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits.
        generator (`torch.Generator`, *optional*): The source of what is drawn, on the CPU.

    Returns:
        `torch.LongTensor` of shape `(num_samples, length)`.
    """
    vocab_size = model.config.vocab_size
    tokens = torch.randint(vocab_size, (num_samples, length), generator=generator)
    for step in range(num_steps):
        level, next_level = step / num_steps, (step + 1) / num_steps
        inputs = tokens.to(model.device)
        times = torch.full((num_samples,), level, device=model.device)
        prediction = (model(inputs, timesteps=times).logits.float() / temperature).softmax(dim=-1).cpu()
        kept = level / next_level
        before = next_level * prediction + (1 - next_level) / vocab_size
        after = kept * F.one_hot(tokens, vocab_size) + (1 - kept) / vocab_size
        weights = (before * after).flatten(0, 1)
        tokens = torch.multinomial(weights, 1, generator=generator).view(num_samples, length)
    return tokens.to(model.device)
