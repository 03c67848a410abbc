# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generative perplexity, and how far to trust it."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from modeling_flm import hub


def load_gen_ppl():
    """The metric of `hub/gen_ppl`, an [`~evaluate.EvaluationModule`]."""
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Generative perplexity needs `pip install modeling-flm[evaluate]`.") from error
    return evaluate.load(str(Path(hub.__file__).parent / "gen_ppl"), keep_in_memory=True)


def confidence_intervals(result: dict[str, Any], num_resamples: int) -> dict[str, list[float]]:
    """95 % intervals of the generative perplexity and the entropy, by resampling the texts."""
    counts = np.array(result["token_counts"], dtype=float)
    totals = np.array([0 if ppl is None else math.log(ppl) for ppl in result["perplexities"]]) * counts
    entropies = np.array([0 if value is None else value for value in result["entropies"]], dtype=float)
    known = np.array([value is not None for value in result["entropies"]])
    rng = np.random.default_rng(0)
    resampled = rng.integers(len(counts), size=(num_resamples, len(counts)))
    with np.errstate(invalid="ignore"):
        draws = {
            "gen_ppl": np.exp(totals[resampled].sum(axis=1) / counts[resampled].sum(axis=1)),
            "entropy": entropies[resampled].sum(axis=1) / known[resampled].sum(axis=1),
        }
    return {f"{name}_interval": np.nanquantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()}
