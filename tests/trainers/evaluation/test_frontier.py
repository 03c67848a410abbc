"""The frontier of perplexity and entropy over temperatures, MAUVE, and throughput."""

import json
import math
import time

import numpy as np
import pytest
import torch
from oracle import SCORER
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flm.trainers.evaluation import (
    Texts,
    compute_mauve,
    divergence_frontier,
    embed_texts,
    measure_throughput,
    perplexity_at_entropy,
    plot_frontier,
    report,
    score,
)


def texts(entropy: float, log_ppl: float, number: int = 5) -> dict:
    """Result of the metric for equal texts."""
    return {
        "perplexities": [math.exp(log_ppl)] * number,
        "token_counts": [7] * number,
        "entropies": [entropy] * number,
    }


class TestPerplexityAtEntropy:
    def test_perplexity_at_entropy_is_log_linear(self):
        curve = [texts(4.0, 3.0), texts(5.0, 4.0), texts(5.5, 6.0)]
        found = perplexity_at_entropy([0.8, 0.9, 1.0], curve, 5.2)
        assert found["gen_ppl"] == pytest.approx(math.exp(4.0 + 0.4 * 2.0))
        assert found["temperature"] == pytest.approx(0.94) and found["entropy"] == 5.2
        assert found["gen_ppl_interval"] == pytest.approx([found["gen_ppl"]] * 2) and found["reached"] == 1
        shuffled = perplexity_at_entropy([1.0, 0.8, 0.9], [curve[2], curve[0], curve[1]], texts(5.2, 1.0, 3))
        for name, value in found.items():
            assert shuffled[name] == pytest.approx(value)

    @pytest.mark.parametrize("target", [3.99, 5.51])
    def test_perplexity_at_entropy_is_never_extrapolated(self, target):
        found = perplexity_at_entropy([0.8, 1.0], [texts(4.0, 3.0), texts(5.5, 6.0)], target)
        assert found["gen_ppl"] is found["gen_ppl_interval"] is found["temperature"] is None
        assert found["entropies"] == [4.0, 5.5] and found["reached"] == 0

    def test_perplexity_at_entropy_on_a_point(self):
        assert perplexity_at_entropy([1.0], [texts(4.0, 3.0)], 4.0)["gen_ppl"] == pytest.approx(math.exp(3.0))
        found = perplexity_at_entropy([0.9, 1.0], [texts(4.0, 3.0), texts(5.0, 2.0)], 5.0)
        assert found["gen_ppl"] == pytest.approx(math.exp(2.0))

    def test_perplexity_at_entropy_of_the_highest_temperatures(self):
        """A frontier that turns back reaches an entropy at several temperatures."""
        curve = [texts(4.0, 1.0), texts(5.0, 2.0), texts(4.0, 4.0)]
        found = perplexity_at_entropy([0.5, 0.7, 0.9], curve, 4.5)
        assert found["gen_ppl"] == pytest.approx(math.exp(3.0)) and found["temperature"] == pytest.approx(0.8)

    def test_interval_on_a_line(self):
        """If the frontier is a line, only the entropy of the reference is uncertain."""
        rng = np.random.default_rng(0)
        curve = []
        for mean in (3.0, 4.0, 5.0):
            entropies = rng.normal(mean, 0.5, size=400)
            perplexities = np.exp(1 + 2 * entropies).tolist()
            curve.append({"perplexities": perplexities, "token_counts": [9] * 400, "entropies": entropies.tolist()})
        fixed = perplexity_at_entropy([0.7, 0.8, 0.9], curve, 4.3)
        assert fixed["gen_ppl"] == pytest.approx(math.exp(1 + 2 * 4.3))
        assert fixed["gen_ppl_interval"] == pytest.approx([fixed["gen_ppl"]] * 2)
        reference = texts(0, 0, 400) | {"entropies": rng.normal(4.3, 0.3, size=400).tolist()}
        found = perplexity_at_entropy([0.7, 0.8, 0.9], curve, reference, 2000)
        low, high = np.log(found["gen_ppl_interval"])
        assert high - low == pytest.approx(2 * 2 * 1.96 * 0.3 / 400**0.5, rel=0.1)
        assert low < math.log(found["gen_ppl"]) < high and found["reached"] == 1

    def test_interval_of_texts_that_share_their_noise(self):
        """An effect that a text's noise has at all temperatures widens the interval as much as at a single temperature."""
        rng = np.random.default_rng(0)
        luck = rng.normal(0, 0.5, size=400)
        curve = [
            texts(entropy, 0, 400) | {"perplexities": np.exp(log_ppl + luck).tolist()}
            for entropy, log_ppl in ((4.0, 3.0), (5.0, 4.0))
        ]
        low, high = np.log(perplexity_at_entropy([0.9, 1.0], curve, 4.5, 2000)["gen_ppl_interval"])
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)

    def test_no_interval_near_the_end_of_the_frontier(self):
        rng = np.random.default_rng(0)
        curve = [texts(4.0, 3.0, 50), texts(5.0, 4.0, 50) | {"entropies": rng.normal(5.0, 0.5, size=50).tolist()}]
        end = float(np.mean(curve[1]["entropies"]))
        found = perplexity_at_entropy([0.9, 1.0], curve, end - 1e-3)
        assert found["gen_ppl"] is not None and found["gen_ppl_interval"] is None and 0.3 < found["reached"] < 0.7

    def test_empty_texts_do_not_count(self):
        curve = [texts(4.0, 3.0), texts(5.0, 4.0)]
        curve[1]["perplexities"][2] = curve[1]["entropies"][2] = None
        curve[1]["token_counts"][2] = 0
        assert perplexity_at_entropy([0.9, 1.0], curve, 4.5)["gen_ppl"] == pytest.approx(math.exp(3.5))

    def test_perplexity_at_entropy_names_wrong_arguments(self):
        with pytest.raises(ValueError, match="`temperatures` has 1 values, but `results` 2"):
            perplexity_at_entropy([1.0], [texts(4.0, 3.0)] * 2, 4.0)
        with pytest.raises(ValueError, match="`num_resamples` must be at least 1"):
            perplexity_at_entropy([1.0], [texts(4.0, 3.0)], 4.0, 0)


@pytest.mark.parametrize("contents", [["", " "], ["a b", "c"]])
@pytest.mark.parametrize("has_temperature", [False, True])
def test_report_of_texts_without_figures(contents, has_temperature, tmp_path):
    """Empty texts have no perplexity, and a reference may have no entropy to compare at."""
    columns = (
        [{"num_steps": 2, "temperature": 0.5}, {"num_steps": 2, "temperature": 1.0}]
        if has_temperature
        else [{"num_steps": 2}]
    )
    columns = [{**each, "num_forward_passes": 2, "seconds_per_text": 0.1} for each in columns]
    collections = [Texts(contents, columns=each) for each in columns] + [
        Texts([""] * 2, columns={"source": "reference"})
    ]
    rows = [score(each, SCORER, device="cpu", num_resamples=10) for each in collections]
    results = report(rows, tmp_path, SCORER, num_resamples=10)
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail) == results
    assert [row["gen_ppl"] is None for row in results["results"]] == [not contents[1].strip()] * len(columns) + [True]
    assert "nan" not in (tmp_path / "results.md").read_text()
    if has_temperature:
        assert results["at_reference_entropy"][0]["gen_ppl"] is None and (tmp_path / "frontier.png").exists()


def test_plot_frontier_draws_a_curve_for_each_number_of_steps(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    original = Axes.errorbar

    def errorbar(self, x, y, **options):
        drawn[options["label"]] = (list(x), list(y))
        return original(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    rows = [
        {"num_steps": n, "sampler": "bridge", "temperature": t, "entropy": 4 + t, "gen_ppl": 90.0 / n}
        for n in (1, 8)
        for t in (1.0, 0.7)
    ]
    rows.append({"source": "reference", "entropy": 5.0, "gen_ppl": 20.0})
    plot_frontier(rows, tmp_path / "frontier.png")
    assert drawn == {"bridge, 1 step": ([4.7, 5.0], [90.0, 90.0]), "bridge, 8 steps": ([4.7, 5.0], [11.25, 11.25])}
    assert (tmp_path / "frontier.png").stat().st_size > 1000


# MAUVE between clusters of (40, 30, 15, 10, 5) texts and of the sizes below, by mauve-text 0.4.0.
MAUVE = {
    (20, 20, 20, 20, 20): 0.8606751833863442,
    (35, 30, 15, 10, 10): 0.9983226292452807,
    (2, 3, 5, 30, 60): 0.09931468099929966,
}


class TestMAUVE:
    def test_divergence_frontier_by_hand(self):
        """The middle of the curve has the divergences to the mean distribution, as in the Jensen-Shannon divergence."""
        p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
        curve = divergence_frontier(p, q, scaling=2.0, num_points=25)
        assert curve.shape == (27, 2) and (np.diff(curve[:, 0]) > 0).all() and (np.diff(curve[:, 1]) < 0).all()
        from_q = 0.5 * math.log(0.25 / 0.375) + 0.5 * math.log(0.5 / 0.25)
        from_p = math.log(0.5 / 0.375)
        assert curve[13] == pytest.approx([math.exp(-2 * from_q), math.exp(-2 * from_p)])

    def test_compute_mauve_of_known_clusters(self):
        """
        With clusters that are far apart, MAUVE depends on their frequencies only, and on no detail of the clustering.
        """
        rng = np.random.default_rng(0)
        centers = 5 * np.eye(5)

        def embeddings(counts):
            labels = np.repeat(np.arange(5), counts)
            return centers[labels] + 0.01 * rng.normal(size=(len(labels), 5))

        first = embeddings([40, 30, 15, 10, 5])
        for counts, expected in MAUVE.items():
            assert compute_mauve(first, embeddings(list(counts)), num_clusters=5) == pytest.approx(expected, rel=1e-6)
            assert compute_mauve(embeddings(list(counts)), first, num_clusters=5) == pytest.approx(expected, rel=1e-6)

    def test_compute_mauve_falls_with_the_distance(self):
        rng = np.random.default_rng(0)
        reference = rng.normal(size=(300, 12))
        values = [compute_mauve(rng.normal(size=(300, 12)) + shift, reference) for shift in (0.0, 0.5, 1.0, 3.0)]
        assert values == sorted(values, reverse=True) and values[0] > 0.9 and values[-1] < 0.1
        assert compute_mauve(np.ones((5, 3)), np.ones((4, 3))) == 1

    def test_compute_mauve_names_wrong_arguments(self):
        with pytest.raises(ValueError, match="at least 2 texts each"):
            compute_mauve(np.ones((1, 3)), np.ones((4, 3)))
        with pytest.raises(ValueError, match="`num_clusters` must be between 2 and the 8 texts"):
            compute_mauve(np.eye(4), np.eye(4), num_clusters=9)

    def test_embed_texts_returns_the_last_state_of_each_text(self):
        lines = ["the cat sat on the mat", "", "a dog", "the cat"]
        features = embed_texts(lines, SCORER, batch_size=3, max_length=5, device="cpu")
        model, tokenizer = AutoModelForCausalLM.from_pretrained(SCORER), AutoTokenizer.from_pretrained(SCORER)
        for line, row in zip(lines, features):
            tokens = tokenizer(line)["input_ids"][:5] or [tokenizer.eos_token_id]
            with torch.no_grad():
                states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1]
            assert row == pytest.approx(states[0, -1].numpy(), abs=1e-5)


class TestThroughput:
    def test_measure_throughput(self):
        calls = []

        def generate(batch_size: int) -> int:
            calls.append(batch_size)
            time.sleep(0.01)
            return 12 * batch_size

        rows = measure_throughput(generate, [1, 4], min_seconds=0.0, min_repeats=5)
        assert calls == [1] * 6 + [4] * 6  # the first is to warm up
        for row, batch_size in zip(rows, (1, 4)):
            assert row["batch_size"] == batch_size
            assert 20 * batch_size < row["texts_per_second"] <= 100 * batch_size
            assert row["tokens_per_second"] == pytest.approx(12 * row["texts_per_second"])

    def test_measure_throughput_out_of_memory(self):
        def generate(batch_size: int) -> int:
            if batch_size > 8:
                raise torch.OutOfMemoryError
            return batch_size

        small, large = measure_throughput(generate, [8, 16], min_seconds=0.0)
        assert small["texts_per_second"] > 0 and large["texts_per_second"] is large["tokens_per_second"] is None
