# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare samplers of one model at several numbers of steps: the share of samples that pass a test, their perplexity, and their diversity.

    python benchmarks/samplers.py --model outputs/sql_fmlm --check examples/sql_queries.py:is_executable --train_file queries.txt
    python benchmarks/samplers.py --model outputs/quickstart/flm --check examples/grammar.py:is_valid --samplers gamma=0 bridge bridge@0.7
    python benchmarks/samplers.py --model outputs/words/fmlm --scorer outputs/words/scorer --train_file words.txt

A sampler is `gamma=G` (follow the flow, with a share G of the noise renewed at every step) or `bridge` (draw tokens at every step),
optionally with a temperature, as in `bridge@0.7`. All samplers start from the same noise, so that one step is the same for every gamma.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_flm.trainers.evaluation import (
    Setting,
    check_figures,
    generate_texts,
    load_check,
    load_lines,
    load_source,
    score,
    self_bleu,
)
from modeling_flm.trainers.evaluation.report import markdown_table


COLUMNS = {
    "passed": "passed, %",
    "perplexity": "perplexity",
    "distinct": "distinct, %",
    "entropy": "entropy",
    "self_bleu": "self-BLEU",
    "copied": "training texts, %",
    "tokens": "tokens",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--check", help="module:function that returns whether a text passes")
    parser.add_argument("--scorer", help="causal language model for the perplexity, which must read the model's texts")
    parser.add_argument("--train_file", help="training texts, to count the samples that equal one")
    parser.add_argument("--reference_file", help="held-out texts, for a row to compare with")
    parser.add_argument("--samplers", nargs="+", default=["gamma=0", "gamma=0.5", "gamma=0.8", "gamma=1"])
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=250)
    return parser


def parse_sampler(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of `generate()`, and the fields of a `Setting`, that a sampler's name stands for."""
    sampler, _, temperature = name.partition("@")
    try:
        fields = {"temperature": float(temperature)} if temperature else {}
        if sampler == "bridge":
            return {}, {"sampler": "bridge", **fields}
        if sampler.startswith("gamma="):
            return {"gamma": float(sampler.removeprefix("gamma="))}, {"sampler": "flow_map", **fields}
    except ValueError:
        pass  # not a number
    raise SystemExit(
        f"`--samplers` must be gamma=G or bridge, with a temperature such as bridge@0.7 if any, got {name!r}."
    )


def token_entropy(token_lists: Sequence[Sequence[int]]) -> float:
    """Returns the entropy of the distribution of the tokens of all texts, in nats."""
    counts = Counter(token for tokens in token_lists for token in tokens)
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def measure(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    check: Callable[[str], Any] | None = None,
    scorer: str | None = None,
    training_texts: Collection[str] | None = None,
) -> dict[str, float]:
    """Returns the figures of one list of texts."""
    tokens = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    figures = {
        "distinct": 100 * len(set(texts)) / len(texts),
        "entropy": token_entropy(tokens),
        "self_bleu": float(self_bleu(texts)[:, 0].mean()),
        "tokens": sum(map(len, tokens)) / len(texts),
    }
    if check is not None:
        figures["passed"] = 100 * check_figures([texts], check)[0]["passed"]
    if scorer is not None:
        figures["perplexity"] = score(texts, scorer=scorer)["gen_ppl"]
    if training_texts is not None:
        figures["copied"] = 100 * sum(text in training_texts for text in texts) / len(texts)
    return figures


def main(args: argparse.Namespace) -> dict[tuple[str, int], dict[str, float]]:
    """Prints the tables and returns the figures of each sampler and number of steps."""
    samplers = {name: parse_sampler(name) for name in args.samplers}
    check = load_check(args.check) if args.check else None
    training_texts = set(load_lines(args.train_file)) if args.train_file else None
    reference = load_lines(args.reference_file) if args.reference_file else []
    reference = random.Random(args.seed).sample(reference, min(len(reference), args.num_samples))
    source = load_source(args.model)
    tokenizer = source.tokenizer
    results = {}
    for name, (parameters, fields) in samplers.items():
        source = replace(source, generate_kwargs=parameters)
        for num_steps in args.num_steps:
            texts = generate_texts(
                source, Setting(num_steps, **fields), args.num_samples, [args.seed], args.batch_size
            )
            results[name, num_steps] = measure(texts.texts, tokenizer, check, args.scorer, training_texts)
    rows = {(name, str(num_steps)): figures for (name, num_steps), figures in results.items()}
    if reference:
        rows["reference", ""] = measure(reference, tokenizer, check, args.scorer, training_texts)
    columns = [name for name in COLUMNS if any(name in figures for figures in rows.values())]
    for name in ("passed", "perplexity"):
        if name in columns:
            print(f"\n{COLUMNS[name]}, by steps\n")
            cells = [[f"{results[sampler, steps][name]:.1f}" for steps in args.num_steps] for sampler in samplers]
            rows_by_steps = [[name, *row] for name, row in zip(samplers, cells)]
            print(markdown_table(["sampler", *map(str, args.num_steps)], rows_by_steps))
    print(f"\nAll figures, {args.num_samples} samples\n")
    digits = {"entropy": 3, "self_bleu": 3}
    cells = [[f"{figures[name]:.{digits.get(name, 1)}f}" for name in columns] for figures in rows.values()]
    headings = ["sampler", "steps", *(COLUMNS[name] for name in columns)]
    print(markdown_table(headings, [[*key, *row] for key, row in zip(rows, cells)]))
    return results


if __name__ == "__main__":
    main(make_parser().parse_args())
