# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation: a file with all results, tables in Markdown, and a plot."""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from modeling_flm.hub.records import to_json

from .frontier import find_frontiers
from .plots import is_finite, plot, plot_frontier


# The published evaluation: its scorer, its number of texts, and the settings that may be described beside its figures.
_PUBLISHED_SCORER, _PUBLISHED_NUM_SAMPLES = "gpt2-large", 1024
_PUBLISHED_SETTINGS = {
    *("protocol", "gamma", "dtype", "revision"),
    *("keep_special_tokens", "max_length", "length", "pad_after_eos", "scorer_dtype"),
}

# Figures of each text, which stay out of the files.
_PER_TEXT = ("perplexities", "token_counts", "entropies")


def report(
    rows: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    scorer: str = "gpt2-large",
    sampling: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    throughput: Sequence[Mapping[str, Any]] = (),
    arguments: Mapping[str, Any] | None = None,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """
    Writes `results.json`, `results.md` with tables, and a plot: `results.png` of quality against time, or `frontier.png` if the
    rows have temperatures. Figures that do not exist, such as the perplexity of empty texts, are `null` and empty cells.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Rows of [`score`]. The last one may be of reference texts, with `source` "reference".
        output_dir (`str` or `Path`): Folder to write to.
        scorer (`str`, *optional*, defaults to `"gpt2-large"`): Name of the scorer.
        sampling (`Mapping[str, Any]`, *optional*):
            How texts were generated and scored, from [`~FlowSource.describe`], for the line below the tables.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Seeds of the texts.
        throughput (`Sequence[Mapping[str, Any]]`, *optional*): Rows of [`measure_throughput`], with their settings.
        arguments (`Mapping[str, Any]`, *optional*): Arguments of a command, for `results.json`.
        num_resamples (`int`, *optional*, defaults to 1000): Bootstrap resamples for perplexities at the reference's entropy.

    Returns:
        `dict[str, Any]`: the contents of `results.json`.

    Example:

    ```python
    >>> from modeling_flm.trainers.evaluation import Texts, report, score

    >>> samples = Texts(["It was a day.", "It was a good day."], columns={"source": "samples"})
    >>> results = report([score(samples, scorer="gpt2")], "outputs/evaluation", scorer="gpt2")
    >>> results["num_samples"], results["results"][0]["source"]
    (2, 'samples')
    ```
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    results = without_texts(rows)
    evaluation = {
        "scorer": scorer,
        "num_samples": rows[0]["num_texts"],
        "seeds": list(seeds),
        "sampling": dict(sampling or {}),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    everything = {**evaluation, **({} if arguments is None else {"arguments": dict(arguments)}), "results": results}
    tables = [table(results)]
    has_frontier = any("temperature" in row for row in rows)
    *generated, last = rows
    if has_frontier and last.get("source") == "reference":
        everything["at_reference_entropy"] = find_frontiers(generated, last, num_resamples)
        tables.append(frontier_table(everything["at_reference_entropy"]))
    if throughput:
        everything["throughput"] = list(throughput)
        tables.append(throughput_table(throughput))
    markdown = "\n\n".join([*tables, describe_evaluation(evaluation)]) + "\n"
    (output / "results.json").write_text(to_json(everything, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(markdown, encoding="utf-8")
    if has_frontier:
        plot_frontier(results, output / "frontier.png")
    else:
        plot(results, output / "results.png")
    return json.loads(to_json(everything))


def without_texts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows without the figures of each text."""
    return [{name: value for name, value in row.items() if name not in _PER_TEXT} for row in rows]


def describe_evaluation(evaluation: Mapping[str, Any]) -> str:
    """Returns the line below the table: how the figures were measured, and where that deviates from a published protocol."""
    parts = [f"{evaluation['num_samples']} texts", f"scored by {evaluation['scorer']}"]
    parts += [f"{name} {value}" for name, value in evaluation["sampling"].items()]
    line = ", ".join(parts) + "."
    if evaluation["sampling"].get("protocol") == "published":
        measured = (evaluation["num_samples"], Path(evaluation["scorer"]).name)  # without the owner or the path
        others = evaluation["sampling"].keys() - _PUBLISHED_SETTINGS
        if measured != (_PUBLISHED_NUM_SAMPLES, _PUBLISHED_SCORER) or others:
            line += (
                f" Not comparable with the published figures, which are for {_PUBLISHED_NUM_SAMPLES} texts scored by "
                f"{_PUBLISHED_SCORER}{', without ' + ', '.join(sorted(others)) if others else ''}."
            )
    return line


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a table in Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def _with_interval(row: Mapping[str, Any], name: str, digits: int, factor: float = 1.0, unit: str = "") -> str:
    """Formats a figure and its interval; empty if there is no figure."""
    if not is_finite(row.get(name)):
        return ""
    value, interval = factor * row[name], row.get(f"{name}_interval")
    ends = "" if interval is None else f" ({' - '.join(f'{factor * end:.{digits}f}' for end in interval)})"
    return f"{value:.{digits}f}{unit}{ends}"


def _find_settings(rows: Sequence[Mapping[str, Any]], *names: str) -> list[str]:
    return [name for name in names if any(name in row for row in rows)]


def _setting_cells(row: Mapping[str, Any], names: list[str]) -> list[str]:
    values = (row.get(name, "") for name in names)
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]


def _headings(names: list[str]) -> list[str]:
    return ["steps" if name == "num_steps" else name for name in names]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of the rows, in Markdown."""
    settings = _find_settings(rows, "sampler", "temperature")
    # Heading, digits, factor and unit of the columns that not every evaluation has
    further = {
        "passed": ("passed (95 %)", 1, 100, " %"),
        "self_bleu": ("self-BLEU", 3, 1, ""),
        "mauve": ("MAUVE", 3, 1, ""),
    }
    copied = {name for row in rows for name in row if re.fullmatch(r"copied_\d+", name)}
    for name in sorted(copied, key=lambda name: int(name[7:])):
        further[name] = (f"copied {name[7:]}-grams", 1, 100, " %")
    further |= {"copied_texts": ("copied texts", 1, 100, " %"), "real_words": ("real words", 1, 100, " %")}
    further = {name: style for name, style in further.items() if any(name in row for row in rows)}
    if any(row.get("unknown_tokens") for row in rows):
        further["unknown_tokens"] = ("unknown tokens", 1, 100, " %")
    columns = ["steps", *settings, "forward passes", "s / text", "gen. ppl (95 %)", "entropy (95 %)"]
    columns += ["distinct-1 / 2 / 3", *(style[0] for style in further.values()), "texts"]
    lines = []
    for row in rows:
        cells = [str(row.get("num_steps", row.get("source", ""))), *_setting_cells(row, settings)]
        is_generated = "seconds_per_text" in row
        cells += [f"{row['num_forward_passes']:.4g}", f"{row['seconds_per_text']:.4f}"] if is_generated else ["", ""]
        is_infinite = not is_finite(row["gen_ppl"]) and row.get("num_tokens")
        cells += [
            "not finite" if is_infinite else _with_interval(row, "gen_ppl", 2),
            _with_interval(row, "entropy", 3),
        ]
        cells.append(" / ".join(_with_interval(row, f"distinct_{n}", 3) or "-" for n in (1, 2, 3)))
        cells += [_with_interval(row, name, *style[1:]) for name, style in further.items()]
        notes = {"empty": row["num_empty"], "cut for the scorer": row["num_truncated"]}
        notes = ", ".join(f"{number} {what}" for what, number in notes.items() if number)
        cells.append(f"{row['num_texts']}" + (f" ({notes})" if notes else ""))
        lines.append(cells)
    return markdown_table(columns, lines)


def frontier_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of perplexities at the reference's entropy, in Markdown."""
    settings = _find_settings(rows, "num_steps", "sampler")
    columns = [*_headings(settings), "gen. ppl at the reference's entropy (95 %)", "temperature"]
    lines = []
    for row in rows:
        cells = _setting_cells(row, settings)
        low, high = row["entropies"]
        if row["gen_ppl"] is None:
            known = all(map(is_finite, (row["entropy"], low, high)))
            cells += [f"not reached: {row['entropy']:.3f} is outside of {low:.3f} - {high:.3f}" if known else "", ""]
        else:
            figure = _with_interval(row, "gen_ppl", 2)
            if row["gen_ppl_interval"] is None:
                figure += f" (no interval: {100 * row['reached']:.0f} % of the resamples reach the entropy)"
            cells += [figure, f"{row['temperature']:.3f}"]
        lines.append(cells)
    return markdown_table(columns, lines)


def throughput_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of texts and tokens per second, in Markdown."""
    settings = _find_settings(rows, "num_steps", "sampler", "temperature")
    columns = [*_headings(settings), "batch size", "texts / s", "tokens / s"]
    lines = []
    for row in rows:
        rates = row["texts_per_second"], row["tokens_per_second"]
        rates = ["out of memory", ""] if rates[0] is None else [f"{rate:.4g}" for rate in rates]
        lines.append([*_setting_cells(row, settings), str(row["batch_size"]), *rates])
    return markdown_table(columns, lines)
