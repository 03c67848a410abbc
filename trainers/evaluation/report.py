# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation tells: how its figures came about, a table and a plot."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from modeling_flm import BridgeSamplerConfig

from .arguments import GENERATION, LOOPS, PUBLISHED, EvaluationArguments
from .plots import plain_log_ticks


# What changes the figures, and so goes into the card with them. A gamma always does: 0 is a choice as well.
_SAMPLING = (
    *("protocol", "sampler", "gamma", "temperature", "top_k", "top_p", "timestep_grid", "length", "pad_after_eos"),
    *LOOPS,
    *("guidance_model", "guidance_revision", "guidance_scale"),
    *("max_length", "keep_special_tokens", "scorer_dtype", "dtype", "revision", "tokenizer"),
)

# What may be said of the sampling where figures stand beside the published ones.
_AS_PUBLISHED = {"protocol", "gamma", "dtype", "revision", *PUBLISHED}
_PUBLISHED_SCORER, _PUBLISHED_NUM_SAMPLES = "gpt2-large", 1024


def describe_sampling(args: EvaluationArguments, model: PreTrainedModel) -> dict[str, Any]:
    """How texts are made and scored: what is in effect, be it from a flag or from the model's own configuration."""
    values = {name: getattr(args, name) for name in _SAMPLING if name != "sampler"}
    says_loop = args.num_rounds is not None or args.block_length is not None  # which then counts, and not the model's
    for name in GENERATION:
        if name in LOOPS and says_loop:
            continue
        values[name] = getattr(model.generation_config, name) if values[name] is None else values[name]
    own = model.generation_config.sampler_config
    if args.gamma is None and own is not None:  # it goes before the model's own gamma
        values["gamma"] = getattr(own, "gamma", 0)
    values["gamma"] = float(values["gamma"] or 0)
    is_bridge = args.gamma is None and type(own).__name__ == BridgeSamplerConfig.__name__
    if args.samplers == ["bridge"] or (args.samplers is None and is_bridge):
        values |= {"sampler": "bridge", "gamma": None}
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


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, *rows]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def _with_interval(row: dict[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
    """A figure and its interval, or nothing where there is none."""
    if row.get(name) is None:
        return ""
    value, interval = factor * row[name], row.get(f"{name}_interval")
    ends = "" if interval is None else f" ({' - '.join(f'{factor * end:.{digits}f}' for end in interval)})"
    return f"{value:.{digits}f}{unit}{ends}"


def _setting_columns(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in ("sampler", "temperature") if any(name in row for row in rows)]


def _setting_cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    values = (row.get(name, "") for name in columns)
    return [f"{value:g}" if isinstance(value, float) else value for value in values]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    settings = _setting_columns(rows)
    # Name, digits, factor and unit of what not every evaluation has.
    further = {"self_bleu": ("self-BLEU", 3, 1, ""), "mauve": ("MAUVE", 3, 1, "")}
    copied = sorted(
        (name for row in rows for name in row if re.fullmatch(r"copied_\d+", name)), key=lambda n: int(n[7:])
    )
    further |= {name: (f"copied {name[7:]}-grams", 1, 100, " %") for name in copied}
    further |= {"copied_texts": ("copied texts", 1, 100, " %"), "real_words": ("real words", 1, 100, " %")}
    further = {name: style for name, style in further.items() if any(name in row for row in rows)}
    columns = ["steps", *settings, "forward passes", "s / text", "gen. ppl (95 %)", "entropy (95 %)"]
    columns += ["distinct-1 / 2 / 3", *(style[0] for style in further.values()), "texts"]
    lines = []
    for row in rows:
        cells = [str(row.get("num_steps", row.get("source", ""))), *_setting_cells(row, settings)]
        is_made = "seconds_per_text" in row
        cells += [f"{row['num_forward_passes']:.4g}", f"{row['seconds_per_text']:.4f}"] if is_made else ["", ""]
        cells += [_with_interval(row, "gen_ppl", 2), _with_interval(row, "entropy", 3)]
        cells.append(" / ".join(f"{row[f'distinct_{n}']:.3f}" for n in (1, 2, 3)))
        cells += [_with_interval(row, name, *style[1:]) for name, style in further.items()]
        cells.append(f"{row['num_texts']}" + (f" ({row['num_empty']} empty)" if row["num_empty"] else ""))
        lines.append(cells)
    return _markdown(columns, lines)


def frontier_table(rows: list[dict[str, Any]]) -> str:
    """The perplexities at the entropy of the reference, in Markdown; where there is none, why."""
    settings = [name for name in _setting_columns(rows) if name != "temperature"]
    has_steps = any("num_steps" in row for row in rows)
    columns = [
        *(["steps"] if has_steps else []),
        *settings,
        "gen. ppl at the reference's entropy (95 %)",
        "temperature",
    ]
    lines = []
    for row in rows:
        cells = [str(row["num_steps"])] if has_steps else []
        cells += _setting_cells(row, settings)
        low, high = row["entropies"]
        if row["gen_ppl"] is None:
            cells += [f"not reached: {row['entropy']:.3f} is outside of {low:.3f} - {high:.3f}", ""]
        else:
            figure = _with_interval(row, "gen_ppl", 2)
            if row["gen_ppl_interval"] is None:
                figure += f" (no interval: {100 * row['reached']:.0f} % of the resamples reach the entropy)"
            cells += [figure, f"{row['temperature']:.3f}"]
        lines.append(cells)
    return _markdown(columns, lines)


def throughput_table(rows: list[dict[str, Any]]) -> str:
    """Texts and tokens a second, in Markdown."""
    settings = _setting_columns(rows)
    has_steps = any("num_steps" in row for row in rows)
    columns = [*(["steps"] if has_steps else []), *settings, "batch size", "texts / s", "tokens / s"]
    lines = []
    for row in rows:
        cells = [str(row["num_steps"])] if has_steps else []
        cells += [*_setting_cells(row, settings), str(row["batch_size"])]
        rates = row["texts_per_second"], row["tokens_per_second"]
        cells += ["out of memory", ""] if rates[0] is None else [f"{rate:.4g}" for rate in rates]
        lines.append(cells)
    return _markdown(columns, lines)


def plot(rows: list[dict[str, Any]], path: Path):
    """Generative perplexity and entropy against the time for a text."""
    from matplotlib.figure import Figure  # without pyplot, which may want a screen

    measured = [row for row in rows if "seconds_per_text" in row and math.isfinite(row["gen_ppl"])]
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
            axis.annotate(f" {row.get('num_steps', '')}", (x, y), textcoords="offset points", xytext=(4, 4))
        for row in rows:
            if row.get("source") == "reference":
                axis.axhline(row[name], linestyle="--", color="gray", label="reference")
                axis.legend()
        axis.set(xscale="log", xlabel="seconds per text (numbers at points: steps)", ylabel=label)
        axis.margins(0.12)  # room for the numbers
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for axis in (axes[0].xaxis, axes[0].yaxis, axes[1].xaxis):
        plain_log_ticks(axis)
    figure.suptitle(f"{measured[0]['num_texts']} texts; bars: 95 % intervals", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
