# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Masked diffusion (MDLM, arXiv 2406.07524) on the network of [`~modeling_flm.FLMModel`], as what flow maps are compared with: the
same blocks, training loop and rule of which tokens become known; but tokens are either known or a mask, and a step writes
each of them as if it knew nothing of the others.
"""

import torch

from modeling_flm import FLMConfig, FLMModel
from modeling_flm.modeling_flm import flm_settings
from modeling_flm.sampling_flm import PosteriorRefinement

from .averaging import AveragedTrainer


def new_masked_model(config: FLMConfig, with_places: bool = False) -> FLMModel:
    """
    A masked diffusion model.

    Args:
        config ([`FLMConfig`]): That of the flow-based model to compare with. The mask is a further token after its vocabulary.
        with_places (`bool`, *optional*, defaults to `False`):
            Whether the network is told the place of each token, in the place of its time, which masked diffusion does not need.
            Its positions are relative, and masks are all alike: it cannot tell places apart where all tokens are masked, as
            flows can by their noise. That matters where texts begin and end, and not for blocks of a longer text.
    """
    options = {"vocab_size": config.vocab_size + 1, "per_token_timesteps": with_places}
    return FLMModel(FLMConfig(**{**flm_settings(config), **options}))


def masked_logits(model: FLMModel, input_ids: torch.LongTensor, known: torch.BoolTensor) -> torch.Tensor:
    """
    What the tokens under masks may be.

    Args:
        model ([`FLMModel`]): A masked diffusion model, whose last token is the mask.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens.
        known (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Which of them the model sees.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`: logits of all tokens but the mask.
    """
    mask_token = model.config.vocab_size - 1
    tokens = input_ids.masked_fill(~known, mask_token)
    if model.config.per_token_timesteps:
        times = torch.linspace(0, 1, model.config.max_position_embeddings, device=tokens.device)
        times = times[: tokens.shape[1]].expand(tokens.shape)
    else:
        times = torch.zeros(len(tokens), device=tokens.device)  # the number of masks tells the time
    return model(tokens, timesteps=times).logits[..., :mask_token]


class MaskedDiffusionTrainer(AveragedTrainer):
    """
    Trains a masked diffusion model: in each text a share of the tokens is masked that is uniform in (0, 1], and their
    cross-entropy counts in inverse proportion to it. Tokens whose label is -100 are known.
    """

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
    The variational bound of masked diffusion in continuous time: the loss of the training, summed over a text.

    Args:
        model ([`FLMModel`]): A masked diffusion model, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
        num_times (`int`, *optional*, defaults to 32): How often each is masked, at stratified shares; a forward pass each.
        generator (`torch.Generator`, *optional*): The source of shares and masks, on the CPU.
        prompt_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*): 1 where tokens are known.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`: lower bounds of the log-likelihoods of what is not known, in nats.
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
    Texts by ancestral sampling: in each of equal steps, every token under a mask is written with the probability that the
    schedule asks for, drawn from what it may be, independently of the others.

    Args:
        model ([`FLMModel`]): A masked diffusion model, in evaluation mode.
        num_samples (`int`): The number of texts.
        length (`int`): Their length, in tokens.
        num_steps (`int`): The number of steps, a forward pass each.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits.
        generator (`torch.Generator`, *optional*): The source of what is drawn, on the CPU.

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
    Writes what is not known, the likeliest tokens first.

    Args:
        model ([`FLMModel`]): A masked diffusion model.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens.
        known (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Which of them are given.
        rule ([`~modeling_flm.sampling_flm.PosteriorRefinement`]): Which tokens are kept after each pass.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: the texts, and how many forward passes each of them took.
    """
    tokens, known = input_ids.clone(), known.clone()
    num_passes = torch.zeros(len(tokens), dtype=torch.long)
    for round in range(rule.num_rounds):
        rows = (~known).any(dim=1)
        if not rows.any():
            break
        probabilities = masked_logits(model, tokens[rows], known[rows]).softmax(dim=-1)
        likelihood, written = probabilities.max(dim=-1)
        chosen = rule.commit(round, likelihood, ~known[rows])
        tokens[rows] = torch.where(chosen, written, tokens[rows])
        known[rows] |= chosen
        num_passes[rows.cpu()] += 1
    return tokens, num_passes
