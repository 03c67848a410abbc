# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generative perplexity, and how far to trust it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modeling_flm import hub

from .bootstrap import bootstrap_ratio


def load_gen_ppl():
    """The metric of `hub/gen_ppl`, an [`~evaluate.EvaluationModule`]."""
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Generative perplexity needs `pip install modeling-flm[evaluate]`.") from error
    return evaluate.load(str(Path(hub.__file__).parent / "gen_ppl"), keep_in_memory=True)


def confidence_intervals(result: dict[str, Any], num_resamples: int) -> dict[str, list[float]]:
    """
    Returns 95 % intervals of the generative perplexity and the entropy, by resampling the texts.

    Args:
        result (`dict[str, Any]`): Result of the metric, with `perplexities`, `token_counts` and `entropies`.
        num_resamples (`int`): Number of bootstrap resamples.

    Returns:
        `dict[str, list[float]]`: `gen_ppl_interval` and `entropy_interval`.
    """
    _, gen_ppl = bootstrap_ratio(*total_losses(result), num_resamples, np.exp)
    _, entropy = bootstrap_ratio(*total_entropies(result), num_resamples)
    return {"gen_ppl_interval": gen_ppl, "entropy_interval": entropy}


def total_losses(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the negative log-likelihood of each text and its number of tokens: their ratio is the log-perplexity."""
    counts = np.array(result["token_counts"], dtype=float)
    return np.array([0 if ppl is None else math.log(ppl) for ppl in result["perplexities"]]) * counts, counts


def total_entropies(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entropy of each text, and 1; or 0 and 0 for an empty text."""
    has_tokens = np.array([value is not None for value in result["entropies"]], dtype=float)
    return np.array([0 if value is None else value for value in result["entropies"]], dtype=float), has_tokens
