# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare sampling methods on the quickstart's stories: steps, fresh noise, the bridge sampler, refinement rounds and blocks, with an FLM, an
FMLM and an FMLM+ (a flow map that generates in any order), with and without prompts.

    python examples/any_order.py

Models that are already in --output_dir, such as the models of examples/steering.py, are not trained again.
"""

import argparse
from pathlib import Path

import matplotlib
import steering
from quickstart import load_stories
from steering import Measurements, draw, report, train_fmlm, train_models

from modeling_flm import BridgeSamplerConfig


matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402


THRESHOLD, LOWER_THRESHOLD = 0.9, 0.75  # commit thresholds of posterior refinement


def make_parser() -> argparse.ArgumentParser:
    parser = steering.make_parser()
    parser.description = __doc__
    return parser


def measure(measurements: Measurements):
    """Measures whole stories, and stories with prompts."""
    for num_steps in (1, 2, 4, 8, 16, 32):
        measurements.add("steps", "flm", num_steps)
        measurements.add("bridge", "flm", num_steps, sampler_config=BridgeSamplerConfig())
    for model in ("fmlm", "fmlm_plus"):
        for num_steps in (1, 2, 4, 8):
            measurements.add("steps", model, num_steps)
            measurements.add("gamma 1", model, num_steps, gamma=1.0)
        for num_rounds in (2, 4, 8):
            refined = {"num_rounds": num_rounds, "commit_threshold": THRESHOLD}
            measurements.add("rounds", model, 1, **refined)
            lower = {**refined, "commit_threshold": LOWER_THRESHOLD}
            measurements.add("rounds, lower threshold", model, 1, **lower)
            measurements.add("rounds, kept noise", model, 1, **refined, fresh_noise=False)
            measurements.add("rounds, no threshold", model, 1, num_rounds=num_rounds)
            measurements.add("rounds, no budget", model, 1, **refined, commit_budget=0)
        for block_length in (14, 7, 4):
            measurements.add("blocks", model, 1, block_length=block_length)
    for part, options in measurements.known().items():
        for model in ("fmlm_prompts", "fmlm_plus"):
            for num_steps in (1, 2, 4, 16):
                measurements.add(part, model, num_steps, **options)
        for num_rounds in (2, 4, 8):
            refined = {"num_rounds": num_rounds, "commit_threshold": THRESHOLD, **options}
            measurements.add(f"{part}, rounds", "fmlm_plus", 1, **refined)


def plot(rows: list[dict], path: Path):
    """Draws the percentage of grammatical samples against forward passes, for whole stories and for both prompts."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, layout="constrained")
    names = {"flm": "FLM", "fmlm": "FMLM", "fmlm_prompts": "FMLM, trained with prompts", "fmlm_plus": "FMLM+"}
    whole = ("steps", "gamma 1", "rounds", "blocks")
    chosen = [whole, ("prefix", "prefix, rounds"), ("half", "half, rounds")]
    titles = ("Whole stories", f"First {steering.PREFIX_LENGTH} words known", "A random half known")
    for parts, panel, title in zip(chosen, panels, titles):
        for model in names:
            for part in parts:
                points = [row for row in rows if (row["model"], row["part"]) == (model, part)]
                if points:
                    method = "rounds" if "rounds" in part else part if part in whole else "steps"
                    style = {"steps": "o-", "gamma 1": "s:", "rounds": "^--", "blocks": "v-."}[method]
                    color = f"C{list(names).index(model)}"
                    label = f"{names[model]}, {method}"
                    draw(panel, points, "forward_passes", "valid", style, color=color, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks((1, 2, 4, 8, 16, 32), labels=("1", "2", "4", "8", "16", "32"))
        panel.set(title=title, xlabel="forward passes (mean over samples)", ylim=(0, 102))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=8)
    panels[0].set_ylabel("% grammatical")
    figure.suptitle(f"{rows[0]['num_samples']} samples each; bars: 95 % sampling intervals", fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(args: argparse.Namespace):
    tokenizer, dataset, _ = load_stories(args.seed)
    models = train_models(tokenizer, dataset, args)
    # The FMLM+ starts from the weights of its teacher, the FLM.
    options = {"preset": "any_order", "per_token_timesteps": True}
    models["fmlm_plus"] = train_fmlm("fmlm_plus", models["flm"], 1.0, tokenizer, dataset, args, **options)
    measurements = Measurements(models, tokenizer, args)
    measure(measurements)
    report("any_order", measurements.rows, plot, args)


if __name__ == "__main__":
    main(make_parser().parse_args())
