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
    python examples/evaluate_gen_ppl.py --model me/fmlm --gamma 0.8 --protocol published --output_dir outputs/as_published

Parameters of sampling that are not passed are those of the model's `generation_config.json`. --protocol published measures
as the paper does, for figures that stand beside the paper's: special tokens stay in the texts, these are cut at the model's
length in tokens of the scorer, and GPT-2 large scores 1024 of them in float32.

The output directory gets the texts (`samples_N.jsonl` for N steps), the table as `results.md` and `results.json`, and a plot
of quality against time. --reference_file adds a row for texts of people, to compare with. With --update_card the results
become part of the model: of its folder, from where `hub.publish` takes them into the card, or of its card on the Hub. Every
flag can also stand in a YAML file, given as the first argument. Needs `pip install modeling-flm[evaluate]`.
"""

import json
import math
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
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
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hub.card import eval_results
from hub.records import EVALUATION_NAME
from modeling_flm import FLMGenerationConfig  # which registers the models with the auto classes, too
from trainers import find_text_column, generate_samples, load_gen_ppl, load_texts


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


# What `generate()` takes for every number of steps.
_GENERATION = ("length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos")

# What changes the figures, and so goes into the card with them. A gamma always does: 0 is a choice as well.
_SAMPLING = (
    *("protocol", "gamma", "temperature", "top_k", "top_p", "timesteps", "length", "pad_after_eos"),
    *("guidance_model", "guidance_revision", "guidance_scale"),
    *("max_length", "keep_special_tokens", "scorer_dtype", "dtype", "revision"),
)

# What the published evaluation did, and how to say it of a flag that contradicts it.
_PUBLISHED = {
    "keep_special_tokens": (True, "keeps special tokens in the texts"),
    "max_length": (None, "cuts texts at the length of the model"),
    "length": (None, "has texts of the length of the model"),
    "pad_after_eos": (False, "counts all tokens of the model"),
    "scorer_dtype": ("float32", "scores in float32"),
}
# What may be said of the sampling where figures stand beside the published ones.
_AS_PUBLISHED = {"protocol", "gamma", "dtype", "revision", *_PUBLISHED}
_PUBLISHED_SCORER, _PUBLISHED_NUM_SAMPLES = "gpt2-large", 1024


@dataclass
class EvaluationArguments:
    """What to measure."""

    model: str = field(metadata={"help": "Name of a model of the Hub, or its folder."})
    output_dir: str = field(metadata={"help": "Where to write the texts, the table and the plot."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    protocol: str | None = field(
        default=None, metadata={"help": "published measures as the paper does.", "choices": ["published"]}
    )
    num_steps: list[int] | None = field(
        default=None, metadata={"help": "Numbers of sampling steps. By default 1, 2, 4 and 8."}
    )
    timesteps: list[float] | None = field(
        default=None,
        metadata={"help": "Reparameterized times of the steps, from 0 to 1, in the place of --num_steps."},
    )
    num_samples: int = field(default=1024, metadata={"help": "Texts for each number of steps and each seed."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the noise; their texts are pooled."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts at a time, which does not change them."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Top-k of sampling."})
    top_p: float | None = field(default=None, metadata={"help": "Top-p of sampling."})
    gamma: float | None = field(
        default=None, metadata={"help": "Share of the noise that is drawn anew at every step, 0 to 1."}
    )
    guidance_model: str | None = field(
        default=None, metadata={"help": "Name or folder of a worse model to move away from."}
    )
    guidance_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of that model."})
    guidance_scale: float | None = field(default=None, metadata={"help": "How far to move away from it, such as 2."})
    length: int | None = field(default=None, metadata={"help": "Tokens of each text."})
    pad_after_eos: bool | None = field(
        default=None, metadata={"help": "End texts at their first end token.", "nargs": "?", "const": True}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the model, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa or flash_attention_2."})
    keep_special_tokens: bool | None = field(
        default=None, metadata={"help": "Score special tokens as text, too.", "nargs": "?", "const": True}
    )
    scorer: str = field(default="gpt2-large", metadata={"help": "Causal language model that scores the texts."})
    scorer_batch_size: int = field(default=8, metadata={"help": "Texts to score at a time."})
    scorer_dtype: str | None = field(default=None, metadata={"help": "Precision of the scorer, such as bfloat16."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text that count; see the metric."})
    reference_file: str | None = field(
        default=None,
        metadata={"help": "A txt, jsonl, csv or parquet file of texts to compare with, cut to the model's length."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column of --reference_file with the texts."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the 95 %% confidence intervals."})
    update_card: bool = field(default=False, metadata={"help": "Write the results into the model's card."})


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors about parameters of `generate()` and of the metric into a line about flags."""
    flags = "|".join(definition.name for definition in fields(EvaluationArguments))
    try:
        yield
    except ValueError as error:
        raise SystemExit("error: " + re.sub(rf"`({flags})(=[^`]*)?`", r"--\1\2", str(error))) from error


def check_arguments(args: EvaluationArguments):
    """Raises a `SystemExit` for what cannot be used, and fills in what follows from other arguments."""
    if args.timesteps is not None:
        if args.num_steps is not None:
            raise SystemExit("--timesteps sets the number of steps: leave out --num_steps, also that of a YAML file")
        args.num_steps = [len(args.timesteps) - 1]
    with explained():
        FLMGenerationConfig(**{name: getattr(args, name) for name in (*_GENERATION, "timesteps")})
    args.num_steps = [1, 2, 4, 8] if args.num_steps is None else args.num_steps
    counts = ("num_samples", "batch_size", "scorer_batch_size", "bootstrap")
    if min(*args.num_steps, *(getattr(args, name) for name in counts)) < 1:
        raise SystemExit(f"--num_steps, {', '.join(f'--{name}' for name in counts)} must be at least 1")
    for name in ("num_steps", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise SystemExit(f"--{name} must be different from each other, got {getattr(args, name)}")
    if args.guidance_model is None:
        for name in ("guidance_scale", "guidance_revision"):
            if getattr(args, name) not in (None, "main"):
                raise SystemExit(f"--{name} needs --guidance_model: pass the name or folder of a worse model")
    if args.protocol == "published":
        for name, (value, meaning) in _PUBLISHED.items():
            if getattr(args, name) not in (None, value):
                raise SystemExit(f"--{name}: --protocol published {meaning}; leave out one of them")
            setattr(args, name, value)
    args.keep_special_tokens = bool(args.keep_special_tokens)


def check_context(args: EvaluationArguments):
    """Raises a `SystemExit` where the scorer cannot read texts that are as long as the protocol wants."""
    context = getattr(AutoConfig.from_pretrained(args.scorer), "max_position_embeddings", None)
    if args.protocol == "published" and context is not None and context < args.max_length:
        raise SystemExit(
            f"--protocol published cuts texts at the model's {args.max_length} tokens, but --scorer reads {context}: pass "
            "one that reads more"
        )


def load_models(args: EvaluationArguments, device) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The model and, if there is one, the model to move away from."""
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    models = [
        AutoModel.from_pretrained(name, revision=revision, dtype=args.dtype, **options).to(device).eval()
        for name, revision in ((args.model, args.revision), (args.guidance_model, args.guidance_revision))
        if name is not None
    ]
    return models[0], models[1] if len(models) > 1 else None


def sampling_options(args: EvaluationArguments, guidance_model: PreTrainedModel | None) -> dict[str, Any]:
    """The arguments of `generate()` but for the steps."""
    options = {name: getattr(args, name) for name in (*_GENERATION, "batch_size")}
    options = {name: value for name, value in options.items() if value is not None}
    return options if guidance_model is None else {**options, "guidance_model": guidance_model}


def describe_sampling(args: EvaluationArguments, model: PreTrainedModel) -> dict[str, Any]:
    """How texts are made and scored: what is in effect, be it from a flag or from the model's own configuration."""
    values = {name: getattr(args, name) for name in _SAMPLING}
    for name in _GENERATION:
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


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]], args: EvaluationArguments) -> list[str]:
    """The texts, as they are scored."""
    # The tokenizer of the published evaluation on LM1B made "it's" of "it ' s", which that of transformers 5 does only if
    # it is told to.
    clean_up = True if args.protocol == "published" and isinstance(tokenizer, BertTokenizer) else None
    return tokenizer.batch_decode(
        tokens, skip_special_tokens=not args.keep_special_tokens, clean_up_tokenization_spaces=clean_up
    )


def generate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    args: EvaluationArguments,
    num_steps: int,
    options: dict[str, Any],
) -> tuple[list[dict], float]:
    """The texts as rows with `seed`, `index` and `tokens`, and the seconds of one device for each; on all processes."""
    generate_samples(model, [0], 0, num_steps=1, **options)  # to warm up
    rows = []
    start = time.perf_counter()
    for seed in args.seeds:
        indices = list(range(accelerator.process_index, args.num_samples, accelerator.num_processes))
        times = {} if args.timesteps is None else {"timesteps": args.timesteps}
        tokens = generate_samples(model, indices, seed, num_steps=num_steps, **times, **options).tolist()
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
    return decode(tokenizer, tokens, args), tokens


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
    check_arguments(args)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    metric = load_gen_ppl() if accelerator.is_main_process else None
    model, guidance_model = load_models(args, accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    length = args.length or model.generation_config.length or model.config.max_position_embeddings
    if args.protocol == "published":
        length = args.length = args.max_length = model.config.max_position_embeddings
    options, sampling = sampling_options(args, guidance_model), describe_sampling(args, model)

    # What is wrong with the arguments should show before there is anything.
    reference = None
    with explained():
        generate_samples(model, [0], 0, num_steps=1, **options)
        if accelerator.is_main_process:
            check_context(args)
            score(metric, ["a text"], None, args, accelerator.device)
            if args.reference_file is not None:
                reference = load_reference(args, tokenizer, length)
    output.mkdir(parents=True, exist_ok=True)

    # First everything that the processes share, then the scoring, by the main process alone.
    samples = {}
    for num_steps in args.num_steps:
        rows, seconds = generate(accelerator, model, args, num_steps, options)
        texts = decode(tokenizer, [row["tokens"] for row in rows], args)
        samples[num_steps] = rows, texts, seconds
        if accelerator.is_main_process:
            print(f"{num_steps} steps: {len(rows)} texts, {seconds:.4f} seconds of a device for each", flush=True)
            with open(output / f"samples_{num_steps}.jsonl", "w", encoding="utf-8") as file:
                for row, text in zip(rows, texts):
                    file.write(json.dumps({"text": text, **row}, ensure_ascii=False) + "\n")
    model.cpu()
    if guidance_model is not None:
        guidance_model.cpu()
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    # Every network takes a pass each step.
    networks = [model, guidance_model] if "guidance_model" in sampling else [model]
    num_networks = sum(len(network.embeddings) for network in networks)
    results = []
    for num_steps, (rows, texts, seconds) in samples.items():
        figures = score(metric, texts, [row["tokens"] for row in rows], args, accelerator.device)
        passes = {"num_steps": num_steps, "num_forward_passes": num_steps * num_networks}
        results.append(passes | {"seconds_per_text": seconds} | figures)
    if reference is not None:
        results.append(score(metric, *reference, args, accelerator.device))
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
    report = f"{table(results)}\n\n{describe_evaluation(evaluation)}"
    (output / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    (output / "results.md").write_text(report + "\n", encoding="utf-8")
    plot(results, output / "results.png")
    print(f"\n{report}\n\nTexts, table and plot: {output}")
    if args.update_card:
        update_card(args, evaluation)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # of names that do not exist
        raise SystemExit(f"error: {error}") from error
