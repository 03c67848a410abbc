# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What `study.py` says of its models: scores of their texts, tables and a picture."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from safetensors import safe_open
from study_data import FRACTIONS, Data, StudyArguments, model_folder, snapshot_name
from study_models import CONTENDERS
from tqdm.auto import tqdm

from modeling_flm.trainers import load_gen_ppl
from modeling_flm.trainers.evaluation.frontier import perplexity_at_entropy
from modeling_flm.trainers.evaluation.plots import plain_log_ticks
from modeling_flm.trainers.evaluation.repetition import real_words, repetition_figures, vocabulary_of


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


# How tables and pictures call the models
LABELS = {
    "gpt2": "GPT-2",
    "mdlm": "MDLM",
    "duo": "Duo",
    "flm": "FLM",
    "flm_continued": "FLM, continued",
    "fmlm": "FMLM",
    "fmlm_continued": "FMLM, continued",
}


def read_samples(args: StudyArguments) -> tuple[list[dict], list[dict]]:
    """Rows of texts and rows of likelihoods, with what made them."""
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
    """Perplexity, by the scorer of the study, and entropy of texts."""
    return load_gen_ppl().compute(
        predictions=texts,
        model_id=str(Path(args.output_dir, "scorer", snapshot_name(1.0))),
        batch_size=args.batch_size,
        token_ids=data.tokenizer(texts, add_special_tokens=False)["input_ids"],
    )


def spread(values: list[float | None], digits: int) -> str:
    """The mean of what several seeds gave, and how far they lie from it."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    text = f"{mean:.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {max(known) - mean:.{digits}f}"


def long_real_words(texts: list[str], vocabulary: set[str], is_packed: bool) -> float:
    """
    How many of the words of at least four letters are real, as letters by chance often are shorter ones.

    Args:
        texts (`list[str]`): The texts.
        vocabulary (`set[str]`): The words of the training texts.
        is_packed (`bool`): Whether texts are cut from a longer one, so that the words at their ends do not count.

    Returns:
        `float`: the share, 0 where there is no such word.
    """
    texts = [" ".join(text.split(" ")[1:-1]) for text in texts] if is_packed else texts
    counts = real_words([" ".join(word for word in text.split() if len(word) >= 4) for text in texts], vocabulary)
    return float(counts[:, 0].sum() / max(1, counts[:, 1].sum()))


def report(data: Data, args: StudyArguments):
    """Scores all texts, prints tables, and draws pictures."""
    rows, likelihoods = read_samples(args)
    if not rows:
        raise SystemExit("error: there are no texts yet: run the stage `sample` first")
    vocabulary = vocabulary_of(data.texts["train"])
    path = Path(args.output_dir, "scores.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    reference = {"model": "text", "texts": data.texts["test"][: args.num_samples]}
    for row in tqdm([reference, *rows], desc="Scoring", unit="setting"):
        key = " ".join(str(row.get(name)) for name in ("model", "seed", "fraction", "num_steps", "temperature"))
        if key not in known:
            known[key] = score(row["texts"], data, args)
            path.write_text(json.dumps(known) + "\n")
        row["scores"] = known[key]
    figures = repetition_figures([row["texts"] for row in (reference, *rows)], data.texts["train"], vocabulary)
    for row, each in zip((reference, *rows), figures):
        row.update(each, long_real_words=long_real_words(row["texts"], vocabulary, args.tokenizer == "text8"))
    for row in rows:
        curve = [other for other in rows if setting(other)[:-1] == setting(row)[:-1]]
        row["matched"] = perplexity_near(curve, reference["scores"])
    lines = [f"Text: perplexity {reference['scores']['gen_ppl']:.1f}, entropy {reference['scores']['entropy']:.3f}, "]
    lines[0] += (
        f"real words {100 * reference['long_real_words']:.1f} %, {len(data.tokens['train']):,} texts to learn from."
    )
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
    Path(args.output_dir, "report.json").write_text(json.dumps(summary, indent=1) + "\n")


def setting(row: dict) -> tuple:
    """What distinguishes rows, the temperature last."""
    return tuple(row[name] for name in ("model", "seed", "fraction", "num_steps", "temperature"))


def over_seeds(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def quality_table(rows: list[dict], args: StudyArguments) -> list[str]:
    """Everything about the texts of whole trainings at temperature 1, and the perplexity at the entropy of the text."""
    lines = [
        "| model | forward passes | ms a text | perplexity | entropy | at the text's entropy | real words, % | self-BLEU | "
        "copied whole, % |",
        "|" + "---|" * 9,
    ]
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name}):
            same = over_seeds(rows, model=name, num_steps=num_steps, temperature=1.0, fraction=1.0)
            if same:
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
    """The perplexity of the models that are no flows at the entropy of the texts that the FMLM writes in few steps, by seed."""
    peers = [name for name in ("mdlm", "duo") if name in args.models]
    done = [row for row in rows if row["fraction"] == 1.0]
    columns = sorted({row["num_steps"] for row in done if row["model"] in peers})
    lines = ["| FMLM, passes | seed | entropy | perplexity | at its entropy | " + " | ".join(map(str, columns)) + " |"]
    lines.append("|" + "---|" * (5 + len(columns)))
    for row in over_seeds(done, model="fmlm", temperature=1.0):
        if row["num_steps"] > 4:
            continue
        entropy = row["scores"]["entropy"]
        beginning = f"| {row['num_steps']} | {row['seed']} | {entropy:.3f} | {row['scores']['gen_ppl']:.1f} |"
        for name in peers:
            cells = []
            for num_steps in columns:
                curve = over_seeds(done, model=name, seed=row["seed"], num_steps=num_steps)
                cells.append(spread([perplexity_near(curve, entropy)], 1))
            lines.append(f"{beginning} {LABELS[name]} | " + " | ".join(cells) + " |")
    return lines


def perplexity_near(curve: list[dict], reference: dict | float) -> float | None:
    """The perplexity of texts at several temperatures where they have the entropy of others, or one that is given."""
    if not curve:
        return None
    temperatures, results = [row["temperature"] for row in curve], [row["scores"] for row in curve]
    return perplexity_at_entropy(temperatures, results, reference, num_resamples=1)["gen_ppl"]


def likelihood_table(likelihoods: list[dict], data: Data, args: StudyArguments) -> list[str]:
    """The likelihoods of held-out texts, of whole trainings."""
    number = sum(len(text.encode()) for text in data.texts["test"][: args.num_likelihood_texts])
    number /= min(args.num_likelihood_texts, len(data.texts["test"]))
    lines = ["| model | nats a text | standard error | bits a byte |", "|---|---|---|---|"]
    for name in args.models:
        same = over_seeds(likelihoods, model=name, fraction=1.0)
        if same:
            sign = "" if name == "gpt2" else "≤ "
            nats = [row["nats_per_text"] for row in same]
            bits = spread([value / number / math.log(2) for value in nats], 3)
            errors = spread([row["error"] for row in same], 2)
            lines.append(f"| {LABELS[name]} | {sign}{spread(nats, 2)} | {errors} | {sign}{bits} |")
    return lines


def cost_table(args: StudyArguments) -> list[str]:
    """What the trainings took. The steps of a distilled model are beside those of its teacher."""
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
            teacher = CONTENDERS[name].teacher
            text = f"{steps:,}" if teacher is None else f"{steps:,}, and those of {LABELS[teacher]}"
            lines.append(f"| {LABELS[name]} | {parameters:,} | {text} | {spread(minutes, 1)} |")
    return lines


def compute_table(rows: list[dict], args: StudyArguments) -> list[str]:
    """What more training brings: the perplexity of the fewest and of the most steps after parts of the training."""
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
    """The first texts of each model."""
    lines = ["| model | forward passes | the first two texts |", "|---|---|---|"]
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name}):
            same = over_seeds(rows, model=name, num_steps=num_steps, temperature=1.0, fraction=1.0)
            if same:
                texts = [
                    f"`{text.replace('|', ' ')}`" if text.strip() else "(only spaces)" for text in same[0]["texts"][:2]
                ]
                lines.append(f"| {LABELS[name]} | {num_steps} | {', '.join(texts)} |")
    return lines


def plot(rows: list[dict], reference: dict, path: Path):
    """
    Perplexity at the text's entropy, or where that is out of reach at temperature 1, against passes and seconds. What has an
    entropy far from the text's is left out, as its perplexity says nothing.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    keys: tuple[Callable, Callable] = (lambda row: row["num_steps"], lambda row: 1000 * row["seconds_per_text"])
    for axis, key, label in zip(axes, keys, ("forward passes", "milliseconds a text")):
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
                points.append(
                    (np.mean([key(row) for row in same]), np.mean(values), min(values), max(values), reached)
                )
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
    axes[0].set_ylabel("perplexity at the entropy of the text\n(hollow: at temperature 1, entropy out of reach)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
