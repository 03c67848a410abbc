# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Sudoku by a flow map that writes in any order (FMLM+), beside a masked diffusion model of the same size, steps and data: how
many puzzles each solves in how many forward passes.

    python examples/sudoku/sudoku.py                             # 4 x 4, under an hour on two cores
    python examples/sudoku/sudoku.py --size 9 --hidden_size 512 --num_hidden_layers 8 --num_attention_heads 8 \
        --num_puzzles 50000 --max_steps 50000 --start_steps 12000 --batch_size 256 --bf16   # 9 x 9, on a GPU; not tried yet

The flow map starts from a masked model that was trained for some of the steps, and takes the others itself. Its steps take longer, by
two forward passes for each example that is not on the diagonal, and it has a second time embedding. It sees the whole way more often
than the preset says, which short trainings need. Models that are in the output directory already are not trained again.

A text is a grid, each row after a letter of its own. The letters and the cells of the puzzle are known tokens, in training as
well, and of the others any may be; so all puzzles to learn from are of the hardest kind. Test puzzles are made of grids that are in
no training puzzle. Those called open or empty have several solutions, of which any will do.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import sudoku_puzzles as sudoku
import torch
from datasets import Dataset
from transformers import AutoModel, TrainingArguments, set_seed

from modeling_flm import FLMModel, FMLMConfig, FMLMModel
from modeling_flm.sampling_flm import PosteriorRefinement
from modeling_flm.trainers import EMACallback, FMLMTrainer, FMLMTrainingArguments


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))
from peers.masked_diffusion import MaskedDiffusionTrainer, new_masked_model, unmask  # noqa: E402


FORWARD_PASSES = (1, 2, 4, 8, 16)
EMA_DECAY = 0.995  # of both models


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=sorted(sudoku.CLUES), default=4, help="of the grid")
    parser.add_argument("--num_puzzles", type=int, default=40_000, help="puzzles to train on")
    parser.add_argument("--num_test_puzzles", type=int, default=500, help="puzzles to solve, of each difficulty")
    parser.add_argument("--max_steps", type=int, default=6000, help="optimizer steps of each model, in all")
    parser.add_argument("--start_steps", type=int, default=1500, help="of these, those of the model to start from")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="of masked models; half as much of the flow map"
    )
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument(
        "--commit_threshold", type=float, default=0.999, help="of posterior refinement and of the masked model"
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/sudoku")
    return parser


def split_grids(size: int, rng: random.Random) -> tuple[list[str] | None, list[str] | None]:
    """Filled grids to train on and, others, to test on; of 9 x 9 there are too many to list, or to meet one twice."""
    if size > 4:
        return None, None
    grids = sorted(sudoku.solutions("0" * size * size))
    rng.shuffle(grids)
    return grids[48:], grids[:48]


def sample_puzzles(
    number: int, size: int, grids: list[str] | None, difficulties: list[str], rng: random.Random
) -> list[tuple[str, str]]:
    """Puzzles with their solutions, or with one of them, of these difficulties in turn."""
    examples = []
    for index in range(number):
        solution = sudoku.sample_solution(size, rng) if grids is None else rng.choice(grids)
        difficulty = difficulties[index % len(difficulties)]
        if difficulty in sudoku.OPEN_CLUES[size]:
            puzzle = sudoku.make_open_puzzle(solution, sudoku.OPEN_CLUES[size][difficulty], rng)
        else:
            puzzle = sudoku.make_puzzle(solution, sudoku.CLUES[size][difficulty], rng)
        examples.append((puzzle, solution))
    return examples


def encode(grid: str) -> list[int]:
    """The tokens of a grid: a letter for each row, and its digits. The digit n is the token n - 1, the letters come after them."""
    size = math.isqrt(len(grid))
    rows = [grid[start : start + size] for start in range(0, len(grid), size)]
    return [token for number, row in enumerate(rows) for token in (size + number, *(int(digit) - 1 for digit in row))]


def decode(tokens: list[int]) -> str:
    """The grid of tokens."""
    size = math.isqrt(len(tokens))
    return "".join(str(token + 1) for place, token in enumerate(tokens) if place % (size + 1))


def is_known(puzzle: str) -> list[bool]:
    """Which tokens of a grid a puzzle gives: letters, and its cells."""
    return [token >= 0 for token in encode(puzzle)]


def build_dataset(examples: list[tuple[str, str]]) -> Dataset:
    """Texts of the solutions, with labels where the puzzle is blank."""
    input_ids = [encode(solution) for _, solution in examples]
    labels = [
        [-100 if known else token for token, known in zip(ids, is_known(puzzle))]
        for ids, (puzzle, _) in zip(input_ids, examples)
    ]
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


def training_settings(args: argparse.Namespace, name: str, max_steps: int) -> dict:
    """What all trainings have in common."""
    return {
        "output_dir": f"{args.output_dir}/{name}",
        "max_steps": max_steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": int(0.3 * max_steps), "decay_type": "linear"},
        "warmup_steps": min(100, max_steps // 2),
        "logging_steps": max(1, max_steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "bf16": args.bf16,
        "seed": args.seed,
    }


def train_flow_map(name: str, max_steps: int, start: FLMModel, dataset: Dataset, args: argparse.Namespace):
    """FMLM+, from a masked model and without a teacher."""
    settings = training_settings(args, name, max_steps)
    training_args = FMLMTrainingArguments.from_preset(
        "any_order",
        **{**settings, "learning_rate": args.learning_rate / 2},
        ema_decay=EMA_DECAY,
        boundary_probability=0.25,
        prompts_from_labels=True,
        prompt_fraction=0.5,  # of the others nothing but the puzzle is known
    )
    trainer = FMLMTrainer(FMLMModel.from_masked(start), training_args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()


def train_masked(name: str, max_steps: int, config: FMLMConfig, dataset: Dataset, args: argparse.Namespace):
    """A masked diffusion model."""
    settings = training_settings(args, name, max_steps)
    trainer = MaskedDiffusionTrainer(
        new_masked_model(config),
        TrainingArguments(**settings, remove_unused_columns=False),
        train_dataset=dataset,
        ema=EMACallback(EMA_DECAY),
    )
    trainer.train()
    trainer.save_model()


def trained(name: str, max_steps: int, train: Callable, *what):
    """The model with this name, trained if it is not there."""
    args = what[-1]
    folder = Path(args.output_dir, name)
    if not (folder / "model.safetensors").is_file():
        print(f"Training {folder}", flush=True)
        set_seed(args.seed)
        start = time.perf_counter()
        train(name, max_steps, *what)
        print(f"{name} took {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return AutoModel.from_pretrained(folder)


def solvers(flow_map: FMLMModel, masked, args: argparse.Namespace) -> dict:
    """Ways to solve puzzles: from tokens, known where the puzzle is, and a limit of forward passes to texts and their cost."""
    generator, device = torch.Generator(), flow_map.device

    def write(input_ids, known, **options):
        generator.manual_seed(args.seed)
        output = flow_map.generate(
            input_ids,
            prompt_mask=known,
            batch_size=len(input_ids),
            generator=generator,
            return_dict_in_generate=True,
            **options,
        )
        return output.sequences, output.num_forward_passes

    def rule(limit: int) -> PosteriorRefinement:
        return PosteriorRefinement(num_rounds=limit, threshold=args.commit_threshold)

    def blocks(input_ids, known, limit):
        num_rows = -(-args.size // limit)
        return write(input_ids, known, block_length=num_rows * (args.size + 1), num_steps=1)

    return {
        "flow map": lambda ids, known, limit: write(ids, known, num_steps=limit),
        "refinement": lambda ids, known, limit: write(
            ids, known, num_rounds=limit, commit_threshold=args.commit_threshold, num_steps=1
        ),
        "blocks": blocks,
        "masked": lambda ids, known, limit: unmask(masked, ids.to(device), known.to(device), rule(limit)),
    }


def measure(ways: dict, examples: list[tuple[str, str]], difficulty: str) -> list[dict]:
    """The share of the puzzles that each way solves, and what it costs."""
    input_ids = torch.tensor([encode(solution) for _, solution in examples])
    known = torch.tensor([is_known(puzzle) for puzzle, _ in examples])
    rows = []
    for name, solve in ways.items():
        for limit in FORWARD_PASSES:
            tokens, num_passes = (result.cpu() for result in solve(input_ids * known, known, limit))
            answers = [decode(answer) for answer in tokens.tolist()]
            solved = [sudoku.is_solved(puzzle, answer) for (puzzle, _), answer in zip(examples, answers)]
            cells = (tokens == input_ids)[~known].float().mean().item()
            row = {
                "difficulty": difficulty,
                "way": name,
                "limit": limit,
                "solved": sum(solved) / len(solved),
                "cells": cells,
                "forward_passes": num_passes.float().mean().item(),
            }
            rows.append(row)
            print(
                f"{difficulty:>10}  {name:>10}  {limit:>6}  {row['forward_passes']:>6.2f}  {row['solved']:>7.1%}  {cells:>7.1%}",
                flush=True,
            )
    return rows


def plot(rows: list[dict], path: Path):
    """The share of solved puzzles against forward passes, a panel for each difficulty."""
    difficulties = list(dict.fromkeys(row["difficulty"] for row in rows))
    num_rows = math.ceil(len(difficulties) / 3)
    figure, axes = plt.subplots(num_rows, 3, figsize=(10.2, 3.4 * num_rows), sharex=True, sharey=True, squeeze=False)
    for axis, difficulty in zip(axes.flat, difficulties):
        for name in dict.fromkeys(row["way"] for row in rows):
            points = [
                (row["forward_passes"], 100 * row["solved"])
                for row in rows
                if (row["difficulty"], row["way"]) == (difficulty, name)
            ]
            axis.plot(*zip(*points), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(FORWARD_PASSES, labels=[str(number) for number in FORWARD_PASSES])
        axis.set(title=difficulty, ylim=(-2, 102))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("% of puzzles solved")
    for axis in axes[-1]:
        axis.set_xlabel("forward passes (mean)")
    axes[0, 0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_grid(puzzle: str, answer: str, known_by_now: list[bool]) -> str:
    """A grid for the terminal: given cells in bold, those that are known by now plain, and what may still change dim."""
    styles = {"given": "\033[1m{}\033[0m", "known": "\033[0m{}\033[0m", "open": "\033[2m{}\033[0m"}
    if not sys.stdout.isatty():
        styles = {"given": "[{}]", "known": " {} ", "open": " {}?"}
    cells = [
        styles["given" if given != "0" else "known" if known else "open"].format(digit)
        for given, digit, known in zip(puzzle, answer, known_by_now)
    ]
    size = math.isqrt(len(puzzle))
    return "\n".join("    " + " ".join(cells[start : start + size]) for start in range(0, len(cells), size))


def show(flow_map: FMLMModel, puzzle: str, args: argparse.Namespace):
    """A puzzle being solved, round by round."""
    input_ids, known = torch.tensor([encode(puzzle)]), torch.tensor([is_known(puzzle)])
    output = flow_map.generate(
        input_ids,
        prompt_mask=known,
        num_rounds=4,
        commit_threshold=args.commit_threshold,
        generator=torch.Generator().manual_seed(args.seed),
        output_drafts=True,
        return_dict_in_generate=True,
    )
    is_cell = torch.arange(input_ids.shape[1]) % (args.size + 1) > 0
    commit_rounds = output.commit_rounds[0, is_cell]
    for round, draft in enumerate(output.drafts[0, : commit_rounds.max()], start=1):
        print(f"\n  after forward pass {round}\n")
        print(draw_grid(puzzle, decode(draft.tolist()), (commit_rounds <= round).tolist()), flush=True)
        if sys.stdout.isatty():
            time.sleep(0.7)


def main(args: argparse.Namespace):
    set_seed(args.seed)
    rng = random.Random(args.seed)
    difficulties = [*sudoku.CLUES[args.size], *sudoku.OPEN_CLUES[args.size]]
    train_grids, test_grids = split_grids(args.size, rng)
    examples = sample_puzzles(args.num_puzzles, args.size, train_grids, ["minimal"], rng)
    tests = {name: sample_puzzles(args.num_test_puzzles, args.size, test_grids, [name], rng) for name in difficulties}
    dataset = build_dataset(examples)
    print(f"Learning from {len(dataset):,} puzzles of {args.size} x {args.size}, such as {examples[0][0]}\n")
    config = FMLMConfig(
        vocab_size=2 * args.size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.size * (args.size + 1),
        dropout=0.0,
        attn_logit_softcapping=None,
        per_token_timesteps=True,
        time_reparameterization=None,
    )
    start = trained("start", args.start_steps, train_masked, config, dataset, args)
    flow_map = trained("fmlm_plus", args.max_steps - args.start_steps, train_flow_map, start, dataset, args)
    masked = trained("masked", args.max_steps, train_masked, config, dataset, args)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flow_map, masked = flow_map.to(device), masked.to(device)

    print(f"\n{args.num_test_puzzles} puzzles of each difficulty\n")
    print(f"{'difficulty':>10}  {'way':>10}  {'limit':>6}  {'passes':>6}  {'solved':>7}  {'cells':>7}")
    ways = solvers(flow_map, masked, args)
    rows = [row for name, puzzles in tests.items() for row in measure(ways, puzzles, name)]
    Path(args.output_dir, "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    picture = Path(args.output_dir, "sudoku.png")
    plot(rows, picture)
    print(f"\nPlot: {picture}. A puzzle being solved; given cells in brackets, with ? what may still change:")
    show(flow_map, tests["hard"][0][0], args)


if __name__ == "__main__":
    main(make_parser().parse_args())
