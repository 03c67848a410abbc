# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
transformers' GPT-2, to compare flow maps with: generation from left to right, with as many parameters, on the same sequences of one
length. A BOS token precedes each sequence.
"""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_flm import FLMConfig, FLMModel
from modeling_flm.trainers import AveragedTrainer


def new_gpt2(config: FLMConfig) -> GPT2LMHeadModel:
    """
    Builds a GPT-2 with the width of a flow-based model and the number of blocks that matches its number of parameters best.

    Args:
        config ([`FLMConfig`]): Configuration of the flow-based model. The BOS token is one more token after its vocabulary.
    """

    def build(num_layers: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size + 1,
                n_positions=config.max_position_embeddings,
                n_embd=config.hidden_size,
                n_layer=num_layers,
                n_head=config.num_attention_heads,
                bos_token_id=config.vocab_size,
                eos_token_id=None,
                tie_word_embeddings=False,  # as in flow-based models
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
            )
        )

    with torch.device("meta"):
        wanted = FLMModel(config).num_parameters()
        sizes = [build(num_layers).num_parameters() for num_layers in (1, 2)]
    return build(max(1, round(1 + (wanted - sizes[0]) / (sizes[1] - sizes[0]))))


def autoregressive_logits(model: GPT2LMHeadModel, input_ids: torch.LongTensor) -> torch.Tensor:
    """
    Predicts each token from the tokens before it.

    Args:
        model ([`~transformers.GPT2LMHeadModel`]): A model whose last token is the BOS token.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The sequences, without the BOS token.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`: logits of all tokens except the BOS token.
    """
    bos = model.config.vocab_size - 1
    return model(F.pad(input_ids[:, :-1], (1, 0), value=bos)).logits[..., :bos]


class AutoregressiveTrainer(AveragedTrainer):
    """Trains a GPT-2 on sequences of one length."""

    loss_is_scaled_for_ga = False  # each batch has a mean of its own

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = autoregressive_logits(model, inputs["input_ids"])
        loss = F.cross_entropy(logits.mT, inputs["labels"], ignore_index=-100)
        return (loss, {"logits": logits}) if return_outputs else loss


@torch.no_grad()
def autoregressive_log_likelihood(
    model: GPT2LMHeadModel, input_ids: torch.LongTensor, prompt_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Returns the exact log-likelihood.

    Args:
        model ([`~transformers.GPT2LMHeadModel`]): The model, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(num_texts, sequence_length)`): The texts.
        prompt_mask (`torch.Tensor` of shape `(num_texts, sequence_length)`, *optional*): 1 for the tokens of a prefix.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`: log-likelihoods of the tokens after the prefix, in nats.
    """
    losses = F.cross_entropy(autoregressive_logits(model, input_ids).mT, input_ids, reduction="none")
    return -(losses if prompt_mask is None else losses.masked_fill(prompt_mask.bool(), 0.0)).sum(dim=1)


@torch.no_grad()
def autoregressive_samples(
    model: GPT2LMHeadModel,
    num_samples: int,
    length: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """
    Generates one token after the other.

    Args:
        model ([`~transformers.GPT2LMHeadModel`]): The model, in evaluation mode.
        num_samples (`int`): Number of samples.
        length (`int`): Sequence length, and number of forward passes.
        temperature (`float`, *optional*, defaults to 1.0): Divisor of the logits.
        generator (`torch.Generator`, *optional*): Generator of all draws, on the CPU.

    Returns:
        `torch.LongTensor` of shape `(num_samples, length)`.
    """
    bos = model.config.vocab_size - 1
    newest, cache, tokens = torch.full((num_samples, 1), bos, device=model.device), None, []
    for _ in range(length):
        output = model(newest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = (output.logits[:, -1, :bos].float() / temperature).softmax(dim=-1).cpu()
        newest = torch.multinomial(probabilities, 1, generator=generator).to(model.device)
        tokens.append(newest)
    return torch.cat(tokens, dim=1)
