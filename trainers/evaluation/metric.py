# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The score of texts: generative perplexity, entropy and diversity, with confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_flm import hub
from modeling_flm.hub.loading import find_damage
from modeling_flm.pipeline_flm import check_unicode, encode_texts

from .bootstrap import bootstrap_ratio
from .texts import Texts, as_texts, unknown_share


@lru_cache(maxsize=1)
def load_gen_ppl():
    """Returns the metric of `hub/gen_ppl`, an [`~evaluate.EvaluationModule`]."""
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Generative perplexity needs `pip install modeling-flm[evaluate]`.") from error
    return evaluate.load(str(Path(hub.__file__).parent / "gen_ppl"), keep_in_memory=True)


def score(
    texts: Texts | Sequence[str],
    scorer: str = "gpt2-large",
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """
    Scores texts: one row of the table.

    Args:
        texts ([`Texts`] or `Sequence[str]`): The texts, at least one.
        scorer (`str`, *optional*, defaults to `"gpt2-large"`): Name or folder of the causal language model that scores them.
        batch_size (`int`, *optional*, defaults to 8): Texts per forward pass of the scorer.
        max_length (`int`, *optional*): Tokens of each text that count. By default 1024, or the scorer's context if shorter.
        dtype (`str`, *optional*): Precision of the scorer. By default the precision of its weights.
        device (`str` or `torch.device`, *optional*): Device of the scorer. By default an accelerator if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer for entropy and distinct n-grams, to compare models with different tokenizers. By default the model's tokens
            count if `texts` has them, else the scorer's.
        num_resamples (`int`, *optional*, defaults to 1000): Bootstrap resamples for the 95 % intervals.

    Returns:
        `dict[str, Any]`: the columns of `texts`; `gen_ppl`, `entropy` (nats), `distinct_1` to `distinct_3`, `num_texts`,
        `num_tokens`, `num_empty` and `num_truncated`; `perplexities`, `token_counts` and `entropies` of each text; and
        `gen_ppl_interval` and `entropy_interval`. Figures that do not exist, or are not finite, are `None`.

    Raises:
        `ValueError`: if there are no texts, or `max_length` is longer than the scorer's context.
        `OSError`: if the scorer cannot be loaded.

    Example:

    ```python
    >>> from modeling_flm.trainers.evaluation import score

    >>> row = score(["It was a good day.", "The cat sat on the mat."], scorer="gpt2")
    >>> row["num_texts"], row["gen_ppl_interval"][0] <= row["gen_ppl"] <= row["gen_ppl_interval"][1]
    (2, True)
    ```
    """
    texts = texts if isinstance(texts, Texts) else Texts(as_texts(texts))
    for text in texts.texts:
        check_unicode(text, "texts")
    tokens = texts.tokens
    if tokenizer is not None:
        tokens = encode_texts(tokenizer, texts.texts, split_special_tokens=False)
    try:
        result = load_gen_ppl().compute(
            predictions=texts.texts,
            token_ids=tokens,
            model_id=scorer,
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            device=None if device is None else str(device),
        )
    except OSError as error:
        raise OSError(find_damage(scorer) or error) from error
    columns = (
        texts.columns if tokenizer is None else texts.columns | {"unknown_tokens": unknown_share(tokenizer, tokens)}
    )
    return {**columns, **result, **confidence_intervals(result, num_resamples)}


def confidence_intervals(result: Mapping[str, Any], num_resamples: int) -> dict[str, list[float] | None]:
    """Returns `gen_ppl_interval` and `entropy_interval`, the 95 % intervals of a result of the metric; `None` if they are not finite."""
    _, gen_ppl = bootstrap_ratio(*total_losses(result), num_resamples, np.exp)
    _, entropy = bootstrap_ratio(*total_entropies(result), num_resamples)
    intervals = {"gen_ppl_interval": gen_ppl, "entropy_interval": entropy}
    return {name: interval if np.isfinite(interval).all() else None for name, interval in intervals.items()}


def total_losses(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the negative log-likelihood of each text and its number of tokens: their ratio is the log-perplexity."""
    counts = np.array(result["token_counts"], dtype=float)
    losses = [
        count * (math.inf if ppl is None else math.log(ppl)) if count > 0 else 0.0
        for ppl, count in zip(result["perplexities"], counts)
    ]
    return np.array(losses), counts


def total_entropies(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entropy of each text and its weight in the mean: 1, or 0 for an empty text."""
    has_tokens = np.array([value is not None for value in result["entropies"]], dtype=float)
    return np.array([0 if value is None else value for value in result["entropies"]], dtype=float), has_tokens
