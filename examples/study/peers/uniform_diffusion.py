# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
r"""
Uniform-state diffusion (Duo, arXiv 2506.10892) on the network of [`~modeling_flm.FLMModel`], to compare flow maps with.

At the level \\(\alpha\\), from 0 for noise to 1 for text, a token is kept with probability \\(\alpha\\), and is otherwise uniform over
the K tokens. The paper shows that this is the argmax of a noised one-hot vector, which relates it to flow-based models: \\(\alpha\\) is the
reparameterized time \\(\tau\\) of an FLM's state.

The network predicts \\(x_\theta\\), the distribution of each clean token given the other noised tokens.
"""

import torch
import torch.nn.functional as F

from modeling_flm import FLMModel
from modeling_flm.time_reparameterization import ReparameterizedTime
from modeling_flm.trainers import AveragedTrainer


# Range of the levels. At 0 and 1 the loss is finite, but its terms are not.
LEVELS = (1e-4, 1 - 1e-4)


def noised_tokens(
    input_ids: torch.LongTensor, levels: torch.Tensor, vocab_size: int, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """
    Draws noised tokens.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Clean tokens.
        levels (`torch.Tensor` of shape `(batch_size, 1)`): Probability that a token is kept.
        vocab_size (`int`): Vocabulary size.
        generator (`torch.Generator`, *optional*): Generator of the noise, on the CPU.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    kept = torch.rand(input_ids.shape, generator=generator).to(levels) < levels
    return torch.where(kept, input_ids, torch.randint(vocab_size, input_ids.shape, generator=generator).to(input_ids))


def uniform_loss(
    logits: torch.Tensor, input_ids: torch.LongTensor, noised: torch.LongTensor, levels: torch.Tensor
) -> torch.Tensor:
    r"""
    Returns the integrand of the negative variational bound for levels uniform in (0, 1), per token. Reversed in time,
    noising is a process whose tokens jump from i to j at the rate \\(\bar x_j / (K \alpha \bar x_i)\\), where
    \\(\bar x = K \alpha x + 1 - \alpha\\). The loss is the divergence between these jumps and the jumps of the
    model, with \\(x_\theta\\) instead of x (paper, appendix on the bound).

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Logits of the model.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Clean tokens x.
        noised (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Noised tokens i.
        levels (`torch.Tensor` of shape `(batch_size, 1)`): Levels.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length)`: losses in nats.
    """
    vocab_size, levels = logits.shape[-1], levels[..., None]
    x_bar = vocab_size * levels * F.one_hot(input_ids, vocab_size) + 1 - levels
    model_bar = vocab_size * levels * logits.float().softmax(dim=-1) + 1 - levels
    ratio, model_ratio = (each / each.gather(-1, noised[..., None]) for each in (x_bar, model_bar))
    divergence = model_ratio - ratio + ratio * (ratio.log() - model_ratio.log())
    return divergence.sum(dim=-1) / (vocab_size * levels[..., 0])


class UniformDiffusionTrainer(AveragedTrainer):
    """
    Trains a uniform-state diffusion model. In the first part of the training the network reads soft tokens: a softmax of the Gaussian
    state whose argmax is the noised token.

    Args:
        curriculum_fraction (`float`, *optional*, defaults to 0.5): Fraction of the training with soft tokens.
        curriculum_temperature (`float`, *optional*, defaults to 0.001): Temperature of the softmax, of states with unit variance.
    """

    loss_is_scaled_for_ga = False  # each batch has a mean of its own

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
    Returns the variational bound of uniform-state diffusion in continuous time: the training loss, summed over a text.

    Args:
        model ([`FLMModel`]): A uniform-state diffusion model, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
        num_times (`int`, *optional*, defaults to 32): Number of forward passes, at stratified levels.
        generator (`torch.Generator`, *optional*): Generator of the levels and the noise, on the CPU.

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
    Generates by ancestral sampling: starts from uniform tokens, and in equal steps draws each token from its posterior at the next level,
    independently of the others.

    Args:
        model ([`FLMModel`]): A uniform-state diffusion model, in evaluation mode.
        num_samples (`int`): Number of samples.
        length (`int`): Sequence length.
        num_steps (`int`): Number of steps, one forward pass each.
        temperature (`float`, *optional*, defaults to 1.0): Divisor of the logits.
        generator (`torch.Generator`, *optional*): Generator of all draws, on the CPU.

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
