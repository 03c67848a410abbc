# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Measure the likelihood of a text file under a model: a bound in nats per token, nats per word, and bits per byte.

    python examples/evaluate_likelihood.py --model outputs/quickstart/flm --text_file heldout.txt
    python examples/evaluate_likelihood.py --model me/fmlm --text_file heldout.jsonl --packing wrapped --output_file bound.json

The result is an upper bound of the negative log-likelihood: see `model.log_likelihood_bound`. For a flow map, it is the bound of its
diagonal, where both times are equal. Words and bytes are counted in the texts of the file; characters count as words in scripts without
spaces.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import modeling_flm  # noqa: F401  registers the models, which then load without remote code
from modeling_flm.hub.records import to_json
from modeling_flm.trainers.commands.command_line import check_model_type, with_flags
from modeling_flm.trainers.commands.training import load_pretrained
from modeling_flm.trainers.evaluation import evaluate_likelihood, load_lines
from modeling_flm.trainers.flm_config import check_numbers


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of an FLM or a flow map, with its tokenizer")
    parser.add_argument("--text_file", required=True, help="txt, json, jsonl, csv or parquet file")
    parser.add_argument("--text_column", help="column with the texts")
    parser.add_argument(
        "--sample_by",
        default="line",
        choices=["line", "paragraph", "document"],
        help="unit of a txt file that is one text",
    )
    parser.add_argument(
        "--packing",
        default="texts",
        choices=["texts", "wrapped"],
        help="evaluate each text by itself, in parts if it is too long; or blocks of the model's length, as in training",
    )
    parser.add_argument("--max_texts", type=int, help="maximum number of texts")
    parser.add_argument("--num_times", type=int, default=32, help="noise levels per text")
    parser.add_argument("--batch_size", type=int, default=64, help="maximum number of noised texts per forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="allow running code that comes with the model"
    )
    parser.add_argument("--output_file", type=Path, help="JSON file for the results")
    return parser


def main(args: argparse.Namespace):
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    check_numbers(args, {"max_texts": 1, "num_times": 2, "batch_size": 1, "seed": 0})
    model = load_pretrained("model", AutoModel, args.model, trust_remote_code=args.trust_remote_code).to(device)
    check_model_type("model", model)
    tokenizer = load_pretrained("model", AutoTokenizer, args.model)
    texts = load_lines(args.text_file, args.text_column, args.sample_by)[: args.max_texts]
    figures = evaluate_likelihood(
        model, tokenizer, texts, args.num_times, args.batch_size, args.seed, wrapped=args.packing == "wrapped"
    )
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):>16}  {value:,.4f}" if isinstance(value, float) else f"{name:>16}  {value:,}")
    if args.output_file is not None:
        args.output_file.write_text(to_json(figures, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(arguments := make_parser().parse_args())
    except (OSError, ValueError) as error:
        message = str(error).replace("`texts`", "`text_file`")
        raise SystemExit(f"error: {with_flags(message, names=vars(arguments))}") from error
