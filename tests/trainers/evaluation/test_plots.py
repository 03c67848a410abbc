"""Plots: intervals, plain numbers on logarithmic axes, and labels of panels."""

import pytest
import quickstart
import steering
import torch
from matplotlib.figure import Figure

from modeling_flm.trainers.evaluation.plots import plain_log_ticks, plot, share_errors, share_interval


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: saved.append(figure))
    return saved


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


@pytest.mark.parametrize("share, num_samples", [(0.0, 500), (0.276, 500), (0.95, 40), (0.998, 500), (1.0, 500)])
def test_share_interval_has_the_shares_that_the_score_test_accepts(share, num_samples):
    low, high = share_interval(share, num_samples)
    candidates = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    deviation = (share - candidates).abs() / (candidates * (1 - candidates) / num_samples).sqrt()
    kept = candidates[(deviation <= 1.96) | (candidates == share)]
    assert low == pytest.approx(kept.min().item(), abs=1e-5)
    assert high == pytest.approx(kept.max().item(), abs=1e-5)
    below, above = share_errors([share], num_samples)
    assert below[0] >= 0 and above[0] >= 0
    assert below[0] + above[0] == pytest.approx(100 * (high - low))


@pytest.mark.parametrize("share, num_samples", [(1.2, 500), (-0.1, 500), (0.5, 0)])
def test_share_interval_refuses_other_numbers(share, num_samples):
    with pytest.raises(ValueError, match="`share` must be from 0 to 1 and `num_samples` at least 1"):
        share_interval(share, num_samples)


@pytest.mark.parametrize("low, high", [(0.18, 2.2), (57, 63), (0.004, 0.03), (20, 3000)])
def test_plain_log_ticks_are_plain_numbers(low, high):
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(low, high))
    plain_log_ticks(axes.yaxis)
    axes.figure.draw_without_rendering()
    ticks = [float(text) for text in labels(axes.yaxis)]  # "6 × 10¹" does not parse
    assert len([tick for tick in ticks if low <= tick <= high]) >= 3
    assert len(axes.yaxis.get_minorticklocs()) == 0


def test_quickstart_draws_each_objective_in_its_own_panel(figures, tmp_path):
    rows = [
        {"model": name, "num_steps": steps, "valid": 0.9, "num_samples": 500}
        for name in ("FLM", "FMLM")
        for steps in (1, 2)
    ]
    losses = {"FLM": [2.2, 0.2], "FMLM": [0.23, 0.21]}
    logs = {name: [{"step": 1, "loss": a}, {"step": 2, "loss": b}] for name, (a, b) in losses.items()}
    quickstart.plot(rows, logs, tmp_path / "quickstart.png")
    flm, fmlm, samples = figures[0].axes
    for panel, name in ((flm, "FLM"), (fmlm, "FMLM")):
        (line,) = panel.lines
        assert list(line.get_ydata()) == losses[name]
        assert panel.get_title().endswith(f" {name}")
    assert flm.get_ylabel() != fmlm.get_ylabel()
    assert len(samples.containers) == 2 and all(container.has_yerr for container in samples.containers)
    quickstart.plot([row | {"valid": None} for row in rows], logs, tmp_path / "quickstart.png")
    assert len(figures[1].axes) == 2


def test_steering_draws_each_quantity_in_its_own_panel_with_intervals(figures, tmp_path):
    row = {"model": "flm", "num_steps": 8, "valid": 0.9, "with_word": 0.3, "num_samples": 500}
    rows = [row | {"part": part, "scale": scale} for part in ("guidance", "gamma", "reward") for scale in (0.0, 1.0)]
    rows += [row | {"part": part} for part in ("prefix", "half")]
    steering.plot(rows, tmp_path / "steering.png")
    panels = figures[0].axes
    drawn = {(panel.get_title(), panel.get_ylabel()): panel for panel in panels}
    assert len(drawn) == 6
    for (_, label), panel in drawn.items():
        (container,) = panel.containers
        assert container.has_yerr
        assert set(container.lines[0].get_ydata()) == {30.0 if "with" in label else 90.0}
        assert panel.get_xlabel()
    assert "500 samples" in figures[0].get_suptitle()


def test_plot_keeps_labels_inside_the_frame(figures, tmp_path):
    rows = [
        {
            **{"num_steps": steps, "num_texts": 64, "seconds_per_text": 0.01 * steps},
            **{"gen_ppl": 62 - steps, "gen_ppl_interval": (61 - steps, 63 - steps)},
            **{"entropy": 4.0, "entropy_interval": (3.9, 4.1)},
        }
        for steps in (1, 2, 4)
    ]
    plot(rows, tmp_path / "results.png")
    figures[0].draw_without_rendering()
    for panel in figures[0].axes:
        frame = panel.get_window_extent()
        for text in panel.texts:
            box = text.get_window_extent()
            assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        assert all(map(float, labels(panel.xaxis)))
    assert "95 %" in figures[0].get_suptitle()


@pytest.mark.parametrize("num_panels", [2, 3])
def test_share_that_passes_has_a_panel(num_panels, figures, tmp_path):
    intervals = {"gen_ppl_interval": [40, 60], "entropy_interval": [2, 4]}
    row = {"seconds_per_text": 0.1, "num_steps": 1, "gen_ppl": 50, "entropy": 3, "num_texts": 9, **intervals}
    if num_panels == 3:
        row |= {"passed": 0.25, "passed_interval": [0.1, 0.5]}
    plot([row, {**row, "seconds_per_text": 0.2, "num_steps": 2}], tmp_path / "results.png")
    (figure,) = figures
    assert len(figure.axes) == num_panels
    if num_panels == 3:
        line, _, (bars,) = figure.axes[2].containers[0]
        assert list(line.get_ydata()) == [25, 25]
        assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([10, 50])
