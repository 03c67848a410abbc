# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What an evaluation tells: how its figures came about, a table and a plot."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .arguments import GENERATION, LOOPS, PUBLISHED, EvaluationArguments


# What changes the figures, and so goes into the card with them. A gamma always does: 0 is a choice as well.
_SAMPLING = (
    *("protocol", "gamma", "temperature", "top_k", "top_p", "timesteps", "length", "pad_after_eos"),
    *LOOPS,
    *("guidance_model", "guidance_revision", "guidance_scale"),
    *("max_length", "keep_special_tokens", "scorer_dtype", "dtype", "revision"),
)

# What may be said of the sampling where figures stand beside the published ones.
_AS_PUBLISHED = {"protocol", "gamma", "dtype", "revision", *PUBLISHED}
_PUBLISHED_SCORER, _PUBLISHED_NUM_SAMPLES = "gpt2-large", 1024


def describe_sampling(args: EvaluationArguments, model: PreTrainedModel) -> dict[str, Any]:
    """How texts are made and scored: what is in effect, be it from a flag or from the model's own configuration."""
    values = {name: getattr(args, name) for name in _SAMPLING}
    says_loop = args.num_rounds is not None or args.block_length is not None  # which then counts, and not the model's
    for name in GENERATION:
        if name in LOOPS and says_loop:
            continue
        values[name] = getattr(model.generation_config, name) if values[name] is None else values[name]
    values["gamma"] = float(values["gamma"] or 0)
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    if values["guidance_model"] is None or values["guidance_scale"] == 0:
        values |= dict.fromkeys(("guidance_model", "guidance_revision", "guidance_scale"))
    usual = {
        "temperature": 1.0,
        "top_p": 1.0,
        "length": model.config.max_position_embeddings,
        "pad_after_eos": False,
        "guidance_revision": "main",
        "keep_special_tokens": False,
        "fresh_noise": True,
        "commit_budget": "uniform",
        "dtype": "float32",
        "revision": "main",
    }
    return {name: value for name, value in values.items() if value is not None and value != usual.get(name)}


def describe_evaluation(evaluation: dict[str, Any]) -> str:
    """A line for below the table: how the figures came about, and where that is not what the protocol says."""
    parts = [f"{evaluation['num_samples']} texts", f"scored by {evaluation['scorer']}"]
    parts += [f"{name} {value}" for name, value in evaluation["sampling"].items()]
    line = ", ".join(parts) + "."
    if evaluation["sampling"].get("protocol") == "published":
        measured = (evaluation["num_samples"], Path(evaluation["scorer"]).name)  # it may be a folder, or have an owner
        others = evaluation["sampling"].keys() - _AS_PUBLISHED
        if measured != (_PUBLISHED_NUM_SAMPLES, _PUBLISHED_SCORER) or others:
            line += (
                f" Not comparable with the published figures: those are of {_PUBLISHED_NUM_SAMPLES} texts, scored by "
                f"{_PUBLISHED_SCORER}{', without ' + ', '.join(sorted(others)) if others else ''}."
            )
    return line


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = [
        "steps",
        "forward passes",
        "s / text",
        "gen. ppl (95 %)",
        "entropy (95 %)",
        "distinct-1 / 2 / 3",
        "texts",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "num_steps" in row:
            cells = [str(row["num_steps"]), f"{row['num_forward_passes']:.4g}", f"{row['seconds_per_text']:.4f}"]
        else:
            cells = ["reference", "", ""]
        for name, digits in (("gen_ppl", 2), ("entropy", 3)):
            low, high = row[f"{name}_interval"]
            cells.append(f"{row[name]:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})")
        cells.append(" / ".join(f"{row[f'distinct_{n}']:.3f}" for n in (1, 2, 3)))
        cells.append(f"{row['num_texts']}" + (f" ({row['num_empty']} empty)" if row["num_empty"] else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path):
    """Generative perplexity and entropy against the time for a text."""
    from matplotlib.figure import Figure  # without pyplot, which may want a screen

    measured = [row for row in rows if "num_steps" in row and math.isfinite(row["gen_ppl"])]
    if not measured:
        return
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("gen_ppl", "entropy"), ("generative perplexity", "entropy (nats)")):
        times, values = ([row[key] for row in measured] for key in ("seconds_per_text", name))
        intervals = np.array([row[f"{name}_interval"] for row in measured])
        errors = np.abs(intervals.T - np.array(values))
        axis.errorbar(times, values, yerr=errors, marker="o", capsize=3)
        for row, x, y in zip(measured, times, values):
            axis.annotate(f" {row['num_steps']}", (x, y), textcoords="offset points", xytext=(4, 4))
        for row in rows:
            if "num_steps" not in row:
                axis.axhline(row[name], linestyle="--", color="gray", label="reference")
                axis.legend()
        axis.set(xscale="log", xlabel="seconds per text (numbers: steps)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
