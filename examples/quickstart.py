# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Train a small flow-based language model (FLM) from scratch, distil it into a flow map (FMLM), and sample from both: ten minutes on a
laptop's CPU.

    python examples/quickstart.py                          # stories of a small grammar, which can be checked word for word
    python examples/quickstart.py --train_file corpus.txt  # your own text file
    python examples/quickstart.py --train_file names.txt --packing lines   # each line of it on its own
    python examples/quickstart.py --dataset roneneldan/TinyStories

The script trains, evaluates samples at several numbers of steps, shows a sample forming, draws a plot and saves the models.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grammar
import matplotlib
import torch
from datasets import Dataset, DatasetInfo
from transformers import PreTrainedTokenizerBase, TextDiffusionStreamer, set_seed

from modeling_flm import FLMConfig, FLMModel, FMLMModel
from modeling_flm.trainers import (
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
    find_text_column,
    load_texts,
    longest_text,
    pack_dataset,
    pad_dataset,
    train_tokenizer,
)
from modeling_flm.trainers.commands.command_line import friendly_errors
from modeling_flm.trainers.data.loading import check_text
from modeling_flm.trainers.evaluation.plots import plain_log_ticks, share_errors
from modeling_flm.trainers.flm_config import check_numbers


matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402


NUM_STORIES = 50_000  # of the grammar, to train on
FLM_STEPS = (1, 2, 4, 8, 16, 64)
FMLM_STEPS = (1, 2, 4, 8)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="name or folder of a Hub dataset to train on")
    parser.add_argument("--train_file", help="txt, json, jsonl, csv or parquet file to train on")
    parser.add_argument("--text_column", help="column with the texts, if there are several")
    parser.add_argument("--vocab_size", type=int, default=2048, help="vocabulary size for your own texts")
    parser.add_argument("--length", type=int, default=64, help="maximum sequence length for your own texts")
    parser.add_argument("--packing", default="wrapped", choices=["wrapped", "lines"], help="as for flm-train")
    add_training_arguments(parser)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser):
    """Adds the arguments that all examples on the grammar share: sizes of the models and trainings."""
    parser.add_argument("--max_steps", type=int, default=1900, help="optimizer steps of the FLM")
    parser.add_argument("--distillation_steps", type=int, default=1700, help="optimizer steps of the FMLM")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="learning rate of all trainings")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--num_samples", type=int, default=500, help="samples per measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/quickstart")


def check_arguments(args: argparse.Namespace):
    """Raises a `ValueError` for arguments that cannot be used, before any texts are read."""
    least = dict.fromkeys(("max_steps", "distillation_steps", "batch_size", "num_samples"), 1)
    least |= dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), 1)
    check_numbers(args, {**least, "length": 3, "learning_rate": 0, "seed": 0}, {"seed": 2**32})
    if args.hidden_size % (2 * args.num_attention_heads) != 0:
        raise ValueError(f"`hidden_size` must be a multiple of twice `num_attention_heads`, got {args.hidden_size}.")
    if any(path.is_file() for path in (Path(args.output_dir), *Path(args.output_dir).parents)):
        raise ValueError(f"`output_dir`: {args.output_dir} is a file, or within one; pass a folder.")
    if args.dataset is not None and args.train_file is not None:
        raise ValueError("Pass either `dataset` or `train_file`, and not both.")


def load_stories(seed: int) -> tuple[PreTrainedTokenizerBase, Dataset, int]:
    """Returns a tokenizer, training examples and their length for the stories of the grammar."""
    rng = random.Random(seed)
    stories = [grammar.sample_story(rng) for _ in range(NUM_STORIES)]
    tokenizer = train_tokenizer(stories, "word", vocab_size=1000)
    tokenizer.bos_token = tokenizer.eos_token = None  # all stories have the same length, so none is marked
    info = DatasetInfo(description="stories of 28 words, drawn from the small grammar of modeling-flm's quickstart")
    dataset = Dataset.from_dict({"input_ids": tokenizer(stories, add_special_tokens=False)["input_ids"]}, info=info)
    return tokenizer, dataset, grammar.NUM_WORDS


def load_own_texts(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Dataset, int]:
    """Returns the same for the user's texts, with a tokenizer trained on them."""
    try:
        texts = load_texts(
            dataset_name=args.dataset,
            train_file=args.train_file,
            validation_percentage=0,
            text_column=args.text_column,
        )["train"]
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace("`dataset_name`", "`dataset`")) from error
    column = find_text_column(texts, args.text_column)
    tokenizer = train_tokenizer((check_text(row[column], column) for row in texts), "bpe", args.vocab_size)
    if args.packing == "lines":
        length = min(args.length, longest_text(texts, tokenizer, column))
        return tokenizer, pad_dataset(texts, tokenizer, length, column), length
    try:
        return tokenizer, pack_dataset(texts, tokenizer, args.length, column), args.length
    except ValueError as error:  # names the length of blocks
        raise ValueError(str(error).replace("`block_size`", "`length`")) from error


def new_flm(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, length: int, **options) -> FLMModel:
    """Returns a new FLM of the size in the arguments. `options` are further fields of its configuration."""
    config = FLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=length,
        dropout=0.0,  # nearly every example is new
        attn_logit_softcapping=None,  # allows PyTorch's fused attention
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return FLMModel(config)


def training_settings(args: argparse.Namespace, name: str, max_steps: int) -> dict:
    """Returns the settings of both trainings, with a short warm-up, a long plateau and a linear decay of the learning rate."""
    return {
        "output_dir": f"{args.output_dir}/{name}",
        "max_steps": max_steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": int(0.3 * max_steps), "decay_type": "linear"},
        "warmup_steps": min(50, max_steps // 2),
        "ema_decay": 0.995,
        "logging_steps": max(1, max_steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "seed": args.seed,
    }


def distillation_settings(args: argparse.Namespace, name: str, max_steps: int) -> dict:
    """Returns the settings of a short distillation, which often trains on the whole interval from 0 to 1 that one-step sampling uses."""
    return {**training_settings(args, name, max_steps), "boundary_probability": 0.25}


def measure(
    name: str,
    model: FLMModel,
    tokenizer: PreTrainedTokenizerBase,
    all_steps: tuple[int, ...],
    is_valid: Callable[[str], bool] | None,
    args: argparse.Namespace,
) -> list[dict]:
    """Samples at several numbers of steps, and measures which fractions are grammatical and distinct, and the time per sample."""
    rows = []
    for num_steps in all_steps:
        generator = torch.Generator().manual_seed(args.seed)
        start = time.perf_counter()
        tokens = model.generate(
            num_samples=args.num_samples, num_steps=num_steps, batch_size=args.num_samples, generator=generator
        ).cpu()
        seconds = time.perf_counter() - start
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        row = {
            "model": name,
            "num_steps": num_steps,
            "valid": None if is_valid is None else sum(map(is_valid, texts)) / len(texts),
            "distinct": len(set(texts)) / len(texts),
            "seconds": seconds / len(texts),
            "num_samples": len(texts),
        }
        rows.append(row)
        valid = "-" if row["valid"] is None else f"{row['valid']:.1%}"
        print(
            f"{name:>5}  {num_steps:>5}  {valid:>11}  {row['distinct']:>8.1%}  {1000 * row['seconds']:>7.2f}",
            flush=True,
        )
    return rows


def plot(rows: list[dict], log_histories: dict[str, list[dict]], path: Path):
    """Plots the training losses and, for the grammar, the percentage of grammatical samples against the number of steps."""
    has_validity = rows[0]["valid"] is not None
    num_panels = 3 if has_validity else 2
    figure, panels = plt.subplots(1, num_panels, figsize=(4.2 * num_panels, 3.6), layout="constrained")
    # The two losses are not comparable, so each has its own panel.
    objectives = {
        "FLM": ("Training of the FLM", "cross-entropy to the text,\nmean over random times (nats per token)"),
        "FMLM": (
            "Distillation into the FMLM",
            "cross-entropy to soft, moving targets,\nmean over random times (nats per token)",
        ),
    }
    for panel, color, (name, (title, label)) in zip(panels, ("C0", "C1"), objectives.items()):
        logs = [row for row in log_histories[name] if "loss" in row]
        losses = [row["loss"] for row in logs]
        panel.plot([row["step"] for row in logs], losses, color=color)
        panel.set(xlabel="optimizer steps", ylabel=label, title=title)
        if max(losses) > 3 * min(losses) > 0:
            panel.set_yscale("log")
            plain_log_ticks(panel.yaxis)
        else:
            panel.set_ylim(0, 1.1 * max(losses))
        panel.grid(alpha=0.3)
    if has_validity:
        panel = panels[2]
        for name in log_histories:
            chosen = [row for row in rows if row["model"] == name]
            shares = [row["valid"] for row in chosen]
            errors = share_errors(shares, chosen[0]["num_samples"])
            steps = [row["num_steps"] for row in chosen]
            panel.errorbar(steps, [100 * share for share in shares], yerr=errors, marker="o", capsize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(FLM_STEPS, labels=[str(step) for step in FLM_STEPS])
        title = f"Samples ({rows[0]['num_samples']} each; 95 % intervals)"
        panel.set(xlabel="sampling steps", ylabel="% grammatical", ylim=(0, 102), title=title)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: argparse.Namespace):
    check_arguments(args)
    set_seed(args.seed)
    own_texts = args.dataset is not None or args.train_file is not None
    tokenizer, dataset, length = load_own_texts(args) if own_texts else load_stories(args.seed)
    is_valid = None if own_texts else grammar.is_valid
    print(
        f"Training on {len(dataset):,} examples of {length} tokens, with a vocabulary of {len(tokenizer):,}. The first one:\n"
    )
    print(f"    {tokenizer.decode(dataset[0]['input_ids'])}\n")

    print("Training the FLM", flush=True)
    model = new_flm(args, tokenizer, length)
    settings = training_settings(args, "flm", args.max_steps)
    flm_trainer = FLMTrainer(
        model, FLMTrainingArguments(**settings), train_dataset=dataset, processing_class=tokenizer
    )
    flm_trainer.train()
    flm_trainer.save_model()
    # The saved weights are their moving average.
    flm = FLMModel.from_pretrained(settings["output_dir"])

    print("\nDistilling the FLM into the FMLM", flush=True)
    settings = distillation_settings(args, "fmlm", args.distillation_steps)
    fmlm_trainer = FMLMTrainer(
        model=FMLMModel.from_flm(flm),
        args=FMLMTrainingArguments.from_preset("single_stage", **settings),
        teacher=flm,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    fmlm_trainer.train()
    fmlm_trainer.save_model()
    fmlm = FMLMModel.from_pretrained(settings["output_dir"]).to(flm.device)

    print(f"\n{args.num_samples} samples at each number of steps\n")
    print(f"{'model':>5}  {'steps':>5}  {'grammatical':>11}  {'distinct':>8}  {'ms each':>7}")
    rows = measure("FLM", flm, tokenizer, FLM_STEPS, is_valid, args)
    rows += measure("FMLM", fmlm, tokenizer, FMLM_STEPS, is_valid, args)

    print("\nA sample of the FLM, after each of 8 steps:\n")
    if sys.stdout.isatty():
        show = {"streamer": TextDiffusionStreamer(tokenizer, sleep_time=0.5)}
    else:
        show = {"callback": lambda step, _, tokens: print(f"    {step}  {tokenizer.decode(tokens[0])}")}
    flm.generate(num_steps=8, generator=torch.Generator().manual_seed(args.seed + 1), **show)
    tokens = fmlm.generate(num_samples=3, generator=torch.Generator().manual_seed(args.seed + 1))
    print("\nThree samples of the FMLM, in one step each:\n")
    for text in tokenizer.batch_decode(tokens):
        print(f"    {text}")

    picture = Path(args.output_dir) / "quickstart.png"
    plot(rows, {"FLM": flm_trainer.state.log_history, "FMLM": fmlm_trainer.state.log_history}, picture)
    print(f"\nPlot: {picture}. To load the FMLM, here or on a machine without this package:\n")
    print("    from transformers import AutoModel, AutoTokenizer")
    print(f'    model = AutoModel.from_pretrained("{settings["output_dir"]}", trust_remote_code=True)')
    print(f'    tokenizer = AutoTokenizer.from_pretrained("{settings["output_dir"]}", trust_remote_code=True)')
    print("    print(tokenizer.batch_decode(model.generate(num_samples=4)))")


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    with friendly_errors(flags=vars(arguments)):
        main(arguments)
