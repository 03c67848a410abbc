# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The stage `report` of `study.py`: scores of the samples, tables and a plot."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from safetensors import safe_open
from study_data import FRACTIONS, LABELS, Data, StudyArguments, model_folder, snapshot_name
from study_models import STUDY_MODELS
from tqdm.auto import tqdm

from modeling_flm.hub.records import to_json
from modeling_flm.tokenization_flm import has_characters_only
from modeling_flm.trainers import load_gen_ppl
from modeling_flm.trainers.evaluation.frontier import perplexity_at_entropy
from modeling_flm.trainers.evaluation.plots import plain_log_ticks
from modeling_flm.trainers.evaluation.repetition import real_words, repetition_figures, vocabulary_of


matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402


def read_samples(args: StudyArguments) -> tuple[list[dict], list[dict]]:
    """Returns the rows of samples and the rows of likelihoods of the stage `sample`, with model, seed and fraction of the training."""
    rows, likelihoods = [], []
    for seed in args.seeds:
        for name in args.models:
            for fraction in FRACTIONS:
                path = model_folder(name, seed, args) / snapshot_name(fraction) / "samples.jsonl"
                for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                    row = {"model": name, "seed": seed, "fraction": fraction, **json.loads(line)}
                    (rows if "texts" in row else likelihoods).append(row)
    return rows, likelihoods


def score(texts: list[str], data: Data, args: StudyArguments) -> dict:
    """Returns the perplexity of texts under the scorer of the study, and their entropy."""
    return load_gen_ppl().compute(
        predictions=texts,
        model_id=str(Path(args.output_dir, "scorer", snapshot_name(1.0))),
        batch_size=args.batch_size,
        token_ids=data.tokenizer(texts, add_special_tokens=False)["input_ids"],
    )


def spread(values: list[float | None], digits: int) -> str:
    """Formats the mean over seeds and, after ±, the maximum minus the mean."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    text = f"{mean:.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {max(known) - mean:.{digits}f}"


def long_real_words(texts: list[str], vocabulary: set[str], is_packed: bool) -> float:
    """
    Returns the fraction of words with at least four letters that are real words. Random letters often form shorter ones.

    Args:
        texts (`list[str]`): The texts.
        vocabulary (`set[str]`): The words of the training texts.
        is_packed (`bool`): Whether texts are blocks of a longer one. Then their first and last words, which may be cut, do not count.

    Returns:
        `float`: the fraction, or 0 if there is no such word.
    """
    texts = [" ".join(text.split(" ")[1:-1]) for text in texts] if is_packed else texts
    counts = real_words([" ".join(word for word in text.split() if len(word) >= 4) for text in texts], vocabulary)
    return float(counts[:, 0].sum() / max(1, counts[:, 1].sum()))


def report(data: Data, args: StudyArguments):
    """Scores all samples, writes and prints the tables, and draws the plot."""
    rows, likelihoods = read_samples(args)
    if not rows:
        raise SystemExit("error: there are no samples yet: run the stage `sample` first")
    vocabulary = vocabulary_of(data.texts["train"])
    path = Path(args.output_dir, "scores.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    reference = {"model": "text", "texts": data.texts["test"][: args.num_samples]}
    for row in tqdm([reference, *rows], desc="Scoring", unit="setting"):
        key = " ".join(str(row.get(name)) for name in ("model", "seed", "fraction", "num_steps", "temperature"))
        if key not in known:
            known[key] = score(row["texts"], data, args)
            path.write_text(to_json(known) + "\n")
        row["scores"] = {name: math.nan if value is None else value for name, value in known[key].items()}
    figures = repetition_figures([row["texts"] for row in (reference, *rows)], data.texts["train"], vocabulary)
    for row, each in zip((reference, *rows), figures):
        row.update(each, long_real_words=long_real_words(row["texts"], vocabulary, args.tokenizer == "text8"))
    for row in rows:
        curve = [other for other in rows if setting(other)[:-1] == setting(row)[:-1]]
        row["matched"] = perplexity_near(curve, reference["scores"])
    lines = [
        f"Text: perplexity {reference['scores']['gen_ppl']:.1f}, entropy {reference['scores']['entropy']:.3f}, "
        f"real words {100 * reference['long_real_words']:.1f} %, {len(data.tokens['train']):,} training examples."
    ]
    for table in (
        quality_table(rows, args),
        peers_table(rows, args),
        likelihood_table(likelihoods, data, args),
        compute_table(rows, args),
        cost_table(args),
        sample_list(rows, args),
    ):
        lines += ["", *table]
    text = "\n".join(lines) + "\n"
    Path(args.output_dir, "report.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, reference, Path(args.output_dir, "study.png"))
    summary = [{name: value for name, value in row.items() if name not in ("texts", "scores")} for row in rows]
    for short, row in zip(summary, rows):
        short |= {name: row["scores"][name] for name in ("gen_ppl", "entropy")}
    Path(args.output_dir, "report.json").write_text(to_json(summary, indent=1) + "\n")


def setting(row: dict) -> tuple:
    """Returns the settings of a row, the temperature last."""
    return tuple(row[name] for name in ("model", "seed", "fraction", "num_steps", "temperature"))


def over_seeds(rows: list[dict], **wanted) -> list[dict]:
    """Returns the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def final_rows(rows: list[dict], args: StudyArguments) -> Iterator[tuple[str, int, list[dict]]]:
    """Yields each model, each of its numbers of steps, and their rows after the whole training, at temperature 1."""
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name}):
            same = over_seeds(rows, model=name, num_steps=num_steps, temperature=1.0, fraction=1.0)
            if same:
                yield name, num_steps, same


def quality_table(rows: list[dict], args: StudyArguments) -> list[str]:
    """Tabulates the samples of fully trained models at temperature 1, and the perplexity at the entropy of the text."""
    lines = [
        "| model | forward passes | ms per text | perplexity | entropy | at the text's entropy | real words, % | self-BLEU | "
        "copied whole, % |",
        "|" + "---|" * 9,
    ]
    for name, num_steps, same in final_rows(rows, args):
        cells = [
            spread([1000 * row["seconds_per_text"] for row in same], 2),
            spread([row["scores"]["gen_ppl"] for row in same], 1),
            spread([row["scores"]["entropy"] for row in same], 3),
            spread([row["matched"] for row in same], 1),
            spread([100 * row["long_real_words"] for row in same], 1),
            spread([row["self_bleu"] for row in same], 3),
            spread([100 * row["copied_texts"] for row in same], 1),
        ]
        lines.append(f"| {LABELS[name]} | {num_steps} | " + " | ".join(cells) + " |")
    return lines


def peers_table(rows: list[dict], args: StudyArguments) -> list[str]:
    """Tabulates the perplexity of MDLM and Duo at the entropy of the FMLM's samples in few steps, for each seed."""
    peers = [name for name in ("mdlm", "duo") if name in args.models]
    done = [row for row in rows if row["fraction"] == 1.0]
    columns = sorted({row["num_steps"] for row in done if row["model"] in peers})
    lines = ["| FMLM, passes | seed | entropy | perplexity | at its entropy | " + " | ".join(map(str, columns)) + " |"]
    lines.append("|" + "---|" * (5 + len(columns)))
    for row in over_seeds(done, model="fmlm", temperature=1.0):
        if row["num_steps"] > 4:
            continue
        entropy = row["scores"]["entropy"]
        row_start = f"| {row['num_steps']} | {row['seed']} | {entropy:.3f} | {row['scores']['gen_ppl']:.1f} |"
        for name in peers:
            cells = []
            for num_steps in columns:
                curve = over_seeds(done, model=name, seed=row["seed"], num_steps=num_steps)
                cells.append(spread([perplexity_near(curve, entropy)], 1))
            lines.append(f"{row_start} {LABELS[name]} | " + " | ".join(cells) + " |")
    return lines


def perplexity_near(curve: list[dict], reference: dict | float) -> float | None:
    """Interpolates the perplexity of samples at several temperatures to an entropy, given as a number or by other scores."""
    if not curve:
        return None
    temperatures, results = [row["temperature"] for row in curve], [row["scores"] for row in curve]
    return perplexity_at_entropy(temperatures, results, reference, num_resamples=1)["gen_ppl"]


def likelihood_table(likelihoods: list[dict], data: Data, args: StudyArguments) -> list[str]:
    """Tabulates the likelihoods of test texts under fully trained models."""
    sizes = [len(text.encode()) for text in data.texts["test"][: args.num_likelihood_texts]]
    # Blocks of single letters lose their outer spaces as texts
    bytes_per_text = args.length if has_characters_only(data.tokenizer) else sum(sizes) / len(sizes)
    lines = ["| model | nats per text | standard error | bits per byte |", "|---|---|---|---|"]
    for name in args.models:
        same = over_seeds(likelihoods, model=name, fraction=1.0)
        if same:
            sign = "" if name == "gpt2" else "≤ "
            nats = [row["nats_per_text"] for row in same]
            bits = spread([value / bytes_per_text / math.log(2) for value in nats], 3)
            errors = spread([row["error"] for row in same], 2)
            lines.append(f"| {LABELS[name]} | {sign}{spread(nats, 2)} | {errors} | {sign}{bits} |")
    return lines


def cost_table(args: StudyArguments) -> list[str]:
    """Tabulates the sizes and training times of the models. A distilled model also needs the steps of its teacher."""
    lines = ["| model | parameters | optimizer steps | minutes |", "|---|---|---|---|"]
    for name in args.models:
        minutes, parameters, steps = [], 0, 0
        for seed in args.seeds:
            folder = model_folder(name, seed, args)
            weights = folder / snapshot_name(1.0) / "model.safetensors"
            if weights.is_file():
                with safe_open(weights, framework="pt") as file:
                    parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
                last = json.loads((folder / "log.json").read_text())[-1]
                minutes, steps = [*minutes, last["train_runtime"] / 60], last["step"]
        if minutes:
            teacher = STUDY_MODELS[name].teacher
            text = f"{steps:,}" if teacher is None else f"{steps:,} after the {LABELS[teacher]}"
            lines.append(f"| {LABELS[name]} | {parameters:,} | {text} | {spread(minutes, 1)} |")
    return lines


def compute_table(rows: list[dict], args: StudyArguments) -> list[str]:
    """Tabulates the perplexity after fractions of the training, at the fewest and the most steps."""
    lines = ["| model | forward passes | " + " | ".join(f"after {part:g}" for part in FRACTIONS) + " |"]
    lines.append("|" + "---|" * (2 + len(FRACTIONS)))
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name and row["fraction"] < 1}):
            cells = [
                spread(
                    [
                        row["scores"]["gen_ppl"]
                        for row in over_seeds(rows, model=name, num_steps=num_steps, fraction=part, temperature=1.0)
                    ],
                    1,
                )
                for part in FRACTIONS
            ]
            lines.append(f"| {LABELS[name]} | {num_steps} | " + " | ".join(cells) + " |")
    return lines


def sample_list(rows: list[dict], args: StudyArguments) -> list[str]:
    """Tabulates the first samples of each model."""
    lines = ["| model | forward passes | first two samples |", "|---|---|---|"]
    for name, num_steps, same in final_rows(rows, args):
        texts = [f"`{text.replace('|', ' ')}`" if text.strip() else "(only spaces)" for text in same[0]["texts"][:2]]
        lines.append(f"| {LABELS[name]} | {num_steps} | {', '.join(texts)} |")
    return lines


def plot(rows: list[dict], reference: dict, path: Path):
    """
    Plots the perplexity at the entropy of the text against forward passes and time. Where no temperature reaches that entropy, the
    perplexity at temperature 1 is a hollow point. Samples whose entropy differs by more than 10 % are left out, because their perplexity
    is not comparable.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    costs = (("num_steps", 1, "forward passes"), ("seconds_per_text", 1000, "milliseconds per text"))
    for axis, (key, scale, label) in zip(axes, costs):
        for color, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
            own = over_seeds(rows, model=name, temperature=1.0, fraction=1.0)
            points = []
            for num_steps in sorted({row["num_steps"] for row in own}):
                same = over_seeds(own, num_steps=num_steps)
                entropy, expected = np.mean([row["scores"]["entropy"] for row in same]), reference["scores"]["entropy"]
                if abs(entropy / expected - 1) > 0.1:
                    continue
                matched = [row["matched"] for row in same]
                reached = None not in matched
                values = matched if reached else [row["scores"]["gen_ppl"] for row in same]
                cost = scale * np.mean([row[key] for row in same])
                points.append((cost, np.mean(values), min(values), max(values), reached))
            if not points:
                continue
            x, y, low, high, reached = (np.array(column) for column in zip(*points))
            axis.errorbar(x, y, yerr=(y - low, high - y), color=f"C{color}", capsize=3, label=LABELS[name])
            for filled in (True, False):
                axis.scatter(
                    x[reached == filled],
                    y[reached == filled],
                    facecolor=f"C{color}" if filled else "white",
                    edgecolor=f"C{color}",
                    zorder=3,
                )
        axis.axhline(reference["scores"]["gen_ppl"], linestyle="--", color="gray", label="text")
        axis.set(xscale="log", yscale="log", xlabel=label)
        for each in (axis.xaxis, axis.yaxis):
            plain_log_ticks(each)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity at the entropy of the text\n(hollow: at temperature 1; entropy not reached)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
