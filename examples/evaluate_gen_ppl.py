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
"""
Measure the texts of a model at several numbers of steps: generative perplexity, entropy, diversity and time.

    python examples/evaluate_gen_ppl.py --model outputs/fmlm --num_steps 1 2 4 8 --output_dir outputs/fmlm_evaluation
    accelerate launch examples/evaluate_gen_ppl.py --model me/flm --num_steps 32 128 1024 --output_dir outputs/flm_evaluation

The output directory gets the texts (`samples_N.jsonl` for N steps), the table as `results.md` and `results.json`, and a plot
of quality against time. --reference_file adds a row for texts of people, to compare with. With --update_card the results
become part of the model: of its folder, from where `hub.publish` takes them into the card, or of its card on the Hub. Every
flag can also stand in a YAML file, given as the first argument. Needs `pip install modeling-flm[evaluate]`.
"""

import json
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import ModelCard, ModelCardData, metadata_update
from script_utils import parse_arguments
from transformers import AutoModel, AutoTokenizer

import modeling_flm  # noqa: F401 registers the models with the auto classes
from hub.card import EVALUATION_NAME, eval_results
from trainers import find_text_column, generate_samples, load_gen_ppl, load_texts


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


# What changes the figures, and so goes into the card with them.
_SAMPLING = ("temperature", "top_k", "top_p", "max_length", "keep_special_tokens", "revision")


@dataclass
class EvaluationArguments:
    """What to measure."""

    model: str = field(metadata={"help": "Name of a model of the Hub, or its folder."})
    output_dir: str = field(metadata={"help": "Where to write the texts, the table and the plot."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    num_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Numbers of sampling steps."})
    num_samples: int = field(default=1024, metadata={"help": "Texts for each number of steps and each seed."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the noise; their texts are pooled."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts at a time, which does not change them."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Top-k of sampling."})
    top_p: float | None = field(default=None, metadata={"help": "Top-p of sampling."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the model, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa or flash_attention_2."})
    keep_special_tokens: bool = field(default=False, metadata={"help": "Score special tokens as text, too."})
    scorer: str = field(default="gpt2-large", metadata={"help": "Causal language model that scores the texts."})
    scorer_batch_size: int = field(default=8, metadata={"help": "Texts to score at a time."})
    scorer_dtype: str | None = field(default=None, metadata={"help": "Precision of the scorer, such as bfloat16."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text that count; see the metric."})
    reference_file: str | None = field(
        default=None,
        metadata={"help": "A txt, jsonl, csv or parquet file of texts to compare with, cut to the model's length."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column of --reference_file with the texts."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the 95 % confidence intervals."})
    update_card: bool = field(default=False, metadata={"help": "Write the results into the model's card."})


def generate(accelerator: Accelerator, model, args: EvaluationArguments, num_steps: int) -> tuple[list[dict], float]:
    """The texts as rows with `seed`, `index` and `tokens`, and the seconds of one device for each; on all processes."""
    names = ("batch_size", "temperature", "top_k", "top_p")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    generate_samples(model, [0], 0, num_steps=1)  # to warm up
    rows = []
    start = time.perf_counter()
    for seed in args.seeds:
        indices = list(range(accelerator.process_index, args.num_samples, accelerator.num_processes))
        tokens = generate_samples(model, indices, seed, num_steps=num_steps, **options).tolist()
        rows += [{"seed": seed, "index": index, "tokens": row} for index, row in zip(indices, tokens)]
    seconds = time.perf_counter() - start  # the tokens have come to the host
    rows = sorted(gather_object(rows), key=lambda row: (row["seed"], row["index"]))
    return rows, sum(gather_object([seconds])) / len(rows)


def confidence_intervals(result: dict[str, Any], num_resamples: int) -> dict[str, list[float]]:
    """95 % intervals of the generative perplexity and the entropy, by resampling the texts."""
    counts = np.array(result["token_counts"], dtype=float)
    totals = np.array([0 if ppl is None else math.log(ppl) for ppl in result["perplexities"]]) * counts
    entropies = np.array([np.nan if value is None else value for value in result["entropies"]])
    rng = np.random.default_rng(0)
    resampled = rng.integers(len(counts), size=(num_resamples, len(counts)))
    with np.errstate(invalid="ignore"):
        draws = {
            "gen_ppl": np.exp(totals[resampled].sum(axis=1) / counts[resampled].sum(axis=1)),
            "entropy": np.nanmean(entropies[resampled], axis=1),
        }
    return {f"{name}_interval": np.nanquantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()}


def score(
    metric, texts: list[str], tokens: list[list[int]] | None, args: EvaluationArguments, device
) -> dict[str, Any]:
    """The figures of a row of the table."""
    result = metric.compute(
        predictions=texts,
        token_ids=tokens,
        model_id=args.scorer,
        batch_size=args.scorer_batch_size,
        max_length=args.max_length,
        dtype=args.scorer_dtype,
        device=str(device),
    )
    intervals = confidence_intervals(result, args.bootstrap)
    return {name: value for name, value in result.items() if not isinstance(value, list)} | intervals


def load_reference(args: EvaluationArguments, tokenizer, length: int) -> tuple[list[str], list[list[int]]]:
    """Texts of people and their tokens, as many as of the model and as long."""
    dataset = load_texts(train_file=args.reference_file, validation_percentage=0)["train"]
    texts = dataset[find_text_column(dataset, args.text_column)][: args.num_samples * len(args.seeds)]
    if not all(isinstance(text, str) for text in texts):
        raise SystemExit("--text_column: not all of its values are texts; name another")
    tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True), tokens


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
            cells = [str(row["num_steps"]), str(row["num_forward_passes"]), f"{row['seconds_per_text']:.4f}"]
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
    measured = [row for row in rows if "num_steps" in row and math.isfinite(row["gen_ppl"])]
    if not measured:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
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
    plt.close(figure)


def update_card(args: EvaluationArguments, evaluation: dict[str, Any]):
    """Puts the results where the card of the model is, or will be made."""
    folder, results = Path(args.model), eval_results(evaluation)
    name = args.model.rstrip("/").split("/")[-1]
    if not folder.is_dir():
        index = ModelCardData(model_name=name, eval_results=results).to_dict()["model-index"]
        metadata_update(args.model, {"model-index": index}, overwrite=True, revision=args.revision)
        return
    path = folder / EVALUATION_NAME
    if path.is_file():  # other numbers of steps that were measured in the same way stay
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(old.get(key) == evaluation[key] for key in ("scorer", "num_samples", "seeds", "sampling")):
            rows = {row["num_steps"]: row for row in [*old["results"], *evaluation["results"]]}
            evaluation = {**evaluation, "results": [rows[num_steps] for num_steps in sorted(rows)]}
    path.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    if (folder / "README.md").is_file():
        card = ModelCard.load(folder / "README.md")
        others = card.data.eval_results or []
        others = [old for old in others if not any(old.is_equal_except_value(new) for new in results)]
        card.data.model_name, card.data.eval_results = card.data.model_name or name, [*others, *results]
        card.save(folder / "README.md")


def main():
    (args,) = parse_arguments(EvaluationArguments)
    output = Path(args.output_dir)
    if (output / "results.json").exists():
        raise SystemExit(f"--output_dir: {output} has results already; name another directory")
    if min(args.num_steps) < 1 or args.num_samples < 1 or args.batch_size < 1 or args.bootstrap < 1:
        raise SystemExit("--num_steps, --num_samples, --batch_size and --bootstrap must be at least 1")
    for name in ("num_steps", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise SystemExit(f"--{name} must be different from each other, got {getattr(args, name)}")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    metric = load_gen_ppl() if accelerator.is_main_process else None
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    model = AutoModel.from_pretrained(args.model, revision=args.revision, dtype=args.dtype, **options)
    model = model.to(accelerator.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    reference = None
    if accelerator.is_main_process:  # what is wrong with the scoring should show before the sampling
        score(metric, ["a text"], None, args, accelerator.device)
        if args.reference_file is not None:
            reference = load_reference(args, tokenizer, model.config.max_position_embeddings)
    output.mkdir(parents=True, exist_ok=True)

    # First everything that the processes share, then the scoring, by the main process alone.
    samples = {}
    for num_steps in args.num_steps:
        rows, seconds = generate(accelerator, model, args, num_steps)
        texts = tokenizer.batch_decode([r["tokens"] for r in rows], skip_special_tokens=not args.keep_special_tokens)
        samples[num_steps] = rows, texts, seconds
        if accelerator.is_main_process:
            print(f"{num_steps} steps: {len(rows)} texts, {seconds:.4f} seconds of a device for each", flush=True)
            with open(output / f"samples_{num_steps}.jsonl", "w", encoding="utf-8") as file:
                for row, text in zip(rows, texts):
                    file.write(json.dumps({"text": text, **row}, ensure_ascii=False) + "\n")
    model.cpu()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    results = []
    for num_steps, (rows, texts, seconds) in samples.items():
        figures = score(metric, texts, [row["tokens"] for row in rows], args, accelerator.device)
        # Two networks take a pass each.
        passes = {"num_steps": num_steps, "num_forward_passes": num_steps * len(model.embeddings)}
        results.append(passes | {"seconds_per_text": seconds} | figures)
    if reference is not None:
        results.append(score(metric, *reference, args, accelerator.device))
    sampling = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) not in (None, False, "main")}
    evaluation = {
        "scorer": args.scorer,
        "num_samples": args.num_samples * len(args.seeds),
        "seeds": args.seeds,
        "sampling": sampling,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": [row for row in results if "num_steps" in row],
    }
    everything = {**evaluation, "arguments": vars(args), "results": results}
    (output / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(table(results) + "\n", encoding="utf-8")
    plot(results, output / "results.png")
    print(f"\n{table(results)}\n\nTexts, table and plot: {output}")
    if args.update_card:
        update_card(args, evaluation)


if __name__ == "__main__":
    main()
