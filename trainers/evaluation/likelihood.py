# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The likelihood of texts under a model: per token, per word and per byte."""

import math

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..batches import example_seed
from .samples import pad_tokens


# Random stream of likelihoods. The trainers and samples use other numbers.
LIKELIHOOD_STREAM = 3


def evaluate_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_lists: list[list[int]],
    num_times: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """
    Measures the bound on the negative log-likelihood of texts, see [`~FLMLikelihoodMixin.log_likelihood_bound`]. Shows its progress.

    Args:
        model ([`~transformers.PreTrainedModel`]): FLM or flow map.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, to count words and bytes.
        token_lists (`list[list[int]]`): The tokens of each text, at most as many as the model's length.
        num_times (`int`, *optional*, defaults to 32): Number of noise levels for each text.
        batch_size (`int`, *optional*, defaults to 64): Largest number of noised texts in a forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of noise levels and noise. Each text has its own random numbers.

    Returns:
        `dict[str, float]`: the bound as `nats_per_text`, `nats_per_token`, `nats_per_word`, `bits_per_byte` and `perplexity` (of
        tokens); `relative_error`, its relative standard error from noise levels and noise; and the numbers of `texts`, `tokens`,
        `words` and `bytes`. Special tokens count as tokens.

    Raises:
        `ValueError`: if there are no tokens, or a text is longer than the model's length.
    """
    longest = max(map(len, token_lists), default=0)
    if longest == 0:
        raise ValueError("`token_lists` has no tokens.")
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"`token_lists` has a text of {longest} tokens, but the model's length is "
            f"{model.config.max_position_embeddings}: split the text."
        )
    order = sorted(range(len(token_lists)), key=lambda index: len(token_lists[index]))  # for little padding
    total = variance = 0.0
    rows_at_a_time = max(1, batch_size // 8)
    for start in tqdm(range(0, len(order), rows_at_a_time), desc="Likelihood", unit="batch"):
        indices = [index for index in order[start : start + rows_at_a_time] if token_lists[index]]
        if not indices:
            continue
        input_ids, attention_mask = pad_tokens([token_lists[index] for index in indices])
        generators = [torch.Generator().manual_seed(example_seed(seed, LIKELIHOOD_STREAM, index)) for index in indices]
        output = model.log_likelihood_bound(
            input_ids,
            None if attention_mask.all() else attention_mask,
            num_times=num_times,
            batch_size=batch_size,
            generator=generators,
        )
        total -= output.log_likelihood.sum().item()
        variance += output.standard_error.square().sum().item()
    texts = tokenizer.batch_decode(token_lists, skip_special_tokens=True)
    counts = {
        "texts": len(texts),
        "tokens": sum(map(len, token_lists)),
        "words": sum(len(text.split()) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    return {
        "nats_per_text": total / counts["texts"],
        "nats_per_token": total / counts["tokens"],
        "nats_per_word": total / max(1, counts["words"]),
        "bits_per_byte": total / math.log(2) / max(1, counts["bytes"]),
        "perplexity": math.exp(min(700.0, total / counts["tokens"])),
        "relative_error": math.sqrt(variance) / total,
        **counts,
    }
