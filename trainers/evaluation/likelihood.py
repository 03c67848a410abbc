# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The likelihood of texts under a model: per token, per word and per byte."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_flm.known_tokens_flm import begin_tokens
from modeling_flm.pipeline_flm import drops_unknown, encode_texts
from modeling_flm.tokenization_flm import count_unknown_tokens
from modeling_flm.utils_flm import check_finite

from ..batches import example_seed
from .samples import end_tokens, ends_texts, find_eos_tokens, pad_tokens
from .texts import as_texts
from .words import count_words


logger = logging.get_logger(__name__)

# Random stream of likelihoods. The trainers and samples use other numbers.
LIKELIHOOD_STREAM = 3


def evaluate_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    num_times: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    wrapped: bool = False,
) -> dict[str, float]:
    """
    Measures the bound on the negative log-likelihood of texts, see [`~FLMLikelihoodMixin.log_likelihood_bound`]. Shows its progress.

    Texts that are longer than the model's are evaluated in parts. Each text or part begins with the BOS token if the texts of the
    training did (`generation_config.bos_token_id`). It is known, as in the pipeline. Texts end with EOS and padding, whose likelihood
    counts, if the model was trained on one text per sequence (`generation_config.pad_after_eos`).

    Args:
        model ([`~transformers.PreTrainedModel`]): FLM or flow map.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        texts (`Sequence[str]`): The texts. Texts without tokens do not count.
        num_times (`int`, *optional*, defaults to 32): Number of noise levels for each text.
        batch_size (`int`, *optional*, defaults to 64): Largest number of noised texts in a forward pass.
        seed (`int`, *optional*, defaults to 0): Seed of noise levels and noise. Each text or part has its own random numbers.
        wrapped (`bool`, *optional*, defaults to `False`):
            Whether to concatenate the texts and cut them into blocks of the model's length, as in training, with the EOS token, if
            any, after each text and block. The last block may be shorter.

    Returns:
        `dict[str, float]`: the bound as `nats_per_text`, `nats_per_token`, `nats_per_word` (NaN without words), `bits_per_byte` and `perplexity` (of
        tokens); `relative_error`, its relative standard error from noise levels and noise; and the numbers of `texts`, `cut_texts`
        in several parts, `tokens`, `unknown_tokens` such as `[UNK]`, `words` and `bytes`. Words and bytes are counted in the
        original texts. EOS tokens count as tokens, padding does not.

    Raises:
        `ValueError`: if `texts` are no strings or have no tokens.
    """
    check_finite("`model`", model)
    texts = as_texts(texts)
    token_lists = encode_texts(tokenizer, texts) if texts else []
    texts = [text for text, tokens in zip(texts, token_lists) if tokens]
    token_lists = [tokens for tokens in token_lists if tokens]
    if not texts:
        raise ValueError("`texts` have no tokens.")
    parts, paddings, num_cut = _split(model, tokenizer, token_lists, wrapped)
    order = sorted(range(len(parts)), key=lambda index: len(parts[index]))  # for little padding
    total = variance = 0.0
    num_tokens = 0
    rows_at_a_time = max(1, batch_size // 8)
    for start in tqdm(range(0, len(order), rows_at_a_time), desc="Likelihood", unit="batch"):
        indices = order[start : start + rows_at_a_time]
        input_ids, attention_mask = pad_tokens([parts[index] for index in indices])
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
        num_tokens += output.num_tokens.sum().item() - sum(paddings[index] for index in indices)
    counts = {
        "texts": len(texts),
        "cut_texts": num_cut,
        "tokens": num_tokens,
        "unknown_tokens": warn_of_unknown_tokens(tokenizer, token_lists, texts),
        "words": sum(map(count_words, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
    }
    return {
        "nats_per_text": total / counts["texts"],
        "nats_per_token": total / num_tokens,
        "nats_per_word": total / counts["words"] if counts["words"] else math.nan,
        "bits_per_byte": total / math.log(2) / counts["bytes"],
        "perplexity": math.exp(min(700.0, total / num_tokens)),
        "relative_error": math.sqrt(variance) / total,
        **counts,
    }


def warn_of_unknown_tokens(
    tokenizer: PreTrainedTokenizerBase, token_lists: list[list[int]], texts: Sequence[str]
) -> int:
    """Warns that likelihoods do not tell apart what a tokenizer does not know, and returns the number of such tokens."""
    number = count_unknown_tokens(tokenizer, token_lists, texts)
    if number > 0 and drops_unknown(tokenizer):
        logger.warning(
            f"The tokenizer leaves out {number} characters of the texts that it does not know, beside {sum(map(len, token_lists))} tokens. "
            "The likelihoods are those of the rest, and so are too high."
        )
    elif number > 0:
        logger.warning(
            f"The tokenizer does not know some characters or words of the texts: {number} of {sum(map(len, token_lists))} tokens are "
            f"{tokenizer.unk_token}. The likelihoods leave out which ones these are, and so are too high."
        )
    return number


def _split(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_lists: list[list[int]], wrapped: bool
) -> tuple[list[list[int]], list[int], int]:
    """
    Returns the sequences to evaluate, no longer than the model's, how many of the tokens of each are padding, and the number of
    texts that are in several of them.
    """
    begin = begin_tokens(model.generation_config)
    end = find_eos_tokens(model, tokenizer)[:1] if wrapped else []
    are_whole = ends_texts(model) and not wrapped
    inner = model.config.max_position_embeddings - len(begin) - len(end) - are_whole
    num_cut = start = 0
    for tokens in token_lists:
        num_cut += start // inner != (start + len(tokens) - 1) // inner
        start = start + len(tokens) + len(end) if wrapped else 0
    streams = [[*chain.from_iterable([*tokens, *end] for tokens in token_lists)]] if wrapped else token_lists
    parts, paddings = [], []
    for stream in streams:
        for start in range(0, len(stream), inner):
            part = [*begin, *stream[start : start + inner], *(end if start + inner <= len(stream) else [])]
            is_last = start + inner >= len(stream)
            ending = end_tokens(model, tokenizer, len(part)) if are_whole and is_last else []
            parts.append(part + ending)
            paddings.append(max(0, len(ending) - 1))
    return parts, paddings, num_cut
