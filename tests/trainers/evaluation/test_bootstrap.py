"""Confidence intervals: their width against theory, and their coverage."""

import math

import numpy as np
import pytest

from modeling_flm.trainers.evaluation import bootstrap_ratio, confidence_intervals


def test_bootstrap_ratio_has_the_width_of_theory():
    rng = np.random.default_rng(0)
    hits = (rng.random(900) < 0.3).astype(float)
    ratio, (low, high) = bootstrap_ratio(hits, np.ones(900), 2000)
    assert ratio == hits.mean()
    assert high - low == pytest.approx(2 * 1.96 * (ratio * (1 - ratio) / 900) ** 0.5, rel=0.1)
    assert low < ratio < high


def test_bootstrap_ratio_weighs_texts_by_their_denominators():
    ratio, _ = bootstrap_ratio(np.array([1, 0, 0]), np.array([1, 9, 0]))
    assert ratio == pytest.approx(0.1)
    ratio, interval = bootstrap_ratio(np.zeros(3), np.zeros(3))
    assert math.isnan(ratio) and all(map(math.isnan, interval))


def test_confidence_intervals_cover_the_mean():
    """95 % intervals of the mean of normal variables contain it about as often as that, and have the width of theory."""
    rng = np.random.default_rng(1)
    hits, widths = 0, []
    for _ in range(200):
        logs = rng.normal(2.0, 0.3, size=60)
        figures = {"token_counts": [10] * 60, "perplexities": np.exp(logs).tolist(), "entropies": (logs + 1).tolist()}
        intervals = confidence_intervals(figures, 300)
        low, high = intervals["gen_ppl_interval"]
        hits += low < math.exp(2.0) < high
        widths.append(math.log(high / low))
        assert intervals["entropy_interval"][0] == pytest.approx(math.log(low) + 1, abs=1e-3)
    assert 175 <= hits <= 199
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.3 / 60**0.5, rel=0.1)
