# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Masked diffusion (MDLM, arXiv 2406.07524) on the network of [`~modeling_flm.FLMModel`], to compare flow maps with. It has the same blocks,
training loop and commit rule, but each token is either known or masked, and the tokens of one step are sampled independently.
"""

import torch

from modeling_flm import FLMConfig, FLMModel
from modeling_flm.modeling_flm import flm_settings
from modeling_flm.sampling_flm import PosteriorRefinement
from modeling_flm.trainers import AveragedTrainer


def new_masked_model(config: FLMConfig, with_positions: bool = False) -> FLMModel:
    """
    Builds a masked diffusion model.

    Args:
        config ([`FLMConfig`]): Configuration of the flow-based model to compare with. The mask is one more token after its vocabulary.
        with_positions (`bool`, *optional*, defaults to `False`):
            Whether the network is conditioned on the absolute position of each token, in place of the time, which masked diffusion
            does not need. Rotary positions are relative and all masks are equal, so without this the network cannot distinguish the
            positions of a fully masked sequence; a flow can, by its noise. Use it for texts that begin and end, not for blocks of
            a longer text.
    """
    options = {"vocab_size": config.vocab_size + 1, "per_token_timesteps": with_positions}
    return FLMModel(FLMConfig(**{**flm_settings(config), **options}))


def masked_logits(model: FLMModel, input_ids: torch.LongTensor, known: torch.BoolTensor) -> torch.Tensor:
    """
    Predicts the masked tokens.

    Args:
        model ([`FLMModel`]): A masked diffusion model, whose last token is the mask.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens.
        known (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Mask of the tokens that the model sees.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`: logits of all tokens except the mask.
    """
    mask_token = model.config.vocab_size - 1
    tokens = input_ids.masked_fill(~known, mask_token)
    if model.config.per_token_timesteps:
        times = torch.linspace(0, 1, model.config.max_position_embeddings, device=tokens.device)
        times = times[: tokens.shape[1]].expand(tokens.shape)
    else:
        times = torch.zeros(len(tokens), device=tokens.device)  # the number of masks determines the time
    return model(tokens, timesteps=times).logits[..., :mask_token]


class MaskedDiffusionTrainer(AveragedTrainer):
    """
    Trains a masked diffusion model. In each example a fraction of the tokens, uniform in (0, 1], is masked, and their cross-entropy is
    weighted by the inverse of the fraction. Tokens whose label is -100 are known.
    """

    loss_is_scaled_for_ga = False  # each batch has a mean of its own

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids, is_target = inputs["input_ids"], inputs["labels"] != -100
        order = torch.randperm(len(input_ids), device=input_ids.device)  # stratified
        share = (order + torch.rand(len(input_ids), device=input_ids.device)).div(len(input_ids)).clamp(min=1e-3)
        known = ~is_target | (torch.rand(input_ids.shape, device=input_ids.device) >= share[:, None])
        logits = masked_logits(model, input_ids, known)
        losses = torch.nn.functional.cross_entropy(logits.mT, input_ids, reduction="none")
        loss = (losses * ~known / share[:, None]).sum() / is_target.sum()
        return (loss, {"logits": logits}) if return_outputs else loss


@torch.no_grad()
def masked_log_likelihood(
    model: FLMModel,
    input_ids: torch.LongTensor,
    num_times: int = 32,
    generator: torch.Generator | None = None,
    prompt_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Returns the variational bound of masked diffusion in continuous time: the training loss, summed over a text.

    Args:
        model ([`FLMModel`]): A masked diffusion model, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
        num_times (`int`, *optional*, defaults to 32): Number of forward passes, at stratified fractions of masked tokens.
        generator (`torch.Generator`, *optional*): Generator of the fractions and masks, on the CPU.
        prompt_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*): 1 where tokens are known.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`: lower bounds of the log-likelihoods of the unknown tokens, in nats.
    """
    total = torch.zeros(len(input_ids), device=input_ids.device)
    given = torch.zeros_like(input_ids, dtype=torch.bool) if prompt_mask is None else prompt_mask.bool()
    for stratum in range(num_times):
        share = (stratum + torch.rand(len(input_ids), 1, generator=generator)).div(num_times).clamp(min=1e-3)
        known = (torch.rand(input_ids.shape, generator=generator) >= share).to(input_ids.device) | given
        losses = torch.nn.functional.cross_entropy(
            masked_logits(model, input_ids, known).mT, input_ids, reduction="none"
        )
        total += (losses * ~known / share.to(losses)).sum(dim=1)
    return -total / num_times


@torch.no_grad()
def ancestral_samples(
    model: FLMModel,
    num_samples: int,
    length: int,
    num_steps: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """
    Generates by ancestral sampling in equal steps. Each step unmasks tokens with the probability that the schedule requires, and draws
    them independently from the model's predictions.

    Args:
        model ([`FLMModel`]): A masked diffusion model, in evaluation mode.
        num_samples (`int`): Number of samples.
        length (`int`): Sequence length.
        num_steps (`int`): Number of steps, one forward pass each.
        temperature (`float`, *optional*, defaults to 1.0): Divisor of the logits.
        generator (`torch.Generator`, *optional*): Generator of all draws, on the CPU.

    Returns:
        `torch.LongTensor` of shape `(num_samples, length)`.
    """
    tokens = torch.zeros(num_samples, length, dtype=torch.long, device=model.device)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    for step in range(num_steps):
        probabilities = (masked_logits(model, tokens, known).float() / temperature).softmax(dim=-1).cpu()
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(num_samples, length)
        chosen = torch.rand(num_samples, length, generator=generator) < 1 / (num_steps - step)
        chosen = chosen.to(known.device) & ~known
        tokens, known = torch.where(chosen, drawn.to(tokens.device), tokens), known | chosen
    return tokens


@torch.no_grad()
def unmask(
    model: FLMModel, input_ids: torch.LongTensor, known: torch.BoolTensor, rule: PosteriorRefinement
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Completes sequences, the most likely tokens first.

    Args:
        model ([`FLMModel`]): A masked diffusion model.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens.
        known (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Mask of the known tokens.
        rule ([`~modeling_flm.sampling_flm.PosteriorRefinement`]): Rule that chooses the tokens to keep after each pass.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: the sequences, and the number of forward passes of each.
    """
    tokens, known = input_ids.clone(), known.clone()
    num_passes = torch.zeros(len(tokens), dtype=torch.long)
    for round in range(rule.num_rounds):
        rows = (~known).any(dim=1)
        if not rows.any():
            break
        probabilities = masked_logits(model, tokens[rows], known[rows]).softmax(dim=-1)
        likelihood, predicted = probabilities.max(dim=-1)
        chosen = rule.commit(round, likelihood, ~known[rows])
        tokens[rows] = torch.where(chosen, predicted, tokens[rows])
        known[rows] |= chosen
        num_passes[rows.cpu()] += 1
    return tokens, num_passes
