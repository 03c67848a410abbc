# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Solve Sudoku with a flow map that generates in any order (FMLM+), and compare it with a masked diffusion model of the same size, steps and
data: how many puzzles does each solve in how many forward passes?

    python examples/sudoku/sudoku.py                             # 4 x 4, under an hour on two cores
    python examples/sudoku/sudoku.py --size 9 --hidden_size 512 --num_hidden_layers 8 --num_attention_heads 8 \
        --num_puzzles 50000 --max_steps 50000 --start_steps 12000 --batch_size 256 --bf16   # 9 x 9, on a GPU; not tried yet

The flow map starts from a masked diffusion model that is trained for some of the steps, and is trained itself for the rest. Its steps take
longer, by two forward passes for each example off the diagonal, and it has a second time embedding. It trains on the whole interval from
0 to 1 more often than its preset, because the training is short. Models that are already in --output_dir are not trained again.

A sequence is a grid, each row preceded by a letter. The letters and the puzzle's cells are known tokens, also in training; a random part
of the other cells may be known as well. All training puzzles are therefore of the hardest kind. Test puzzles are made from grids that
are in no training puzzle. Open and empty puzzles have several solutions, and any of them counts.
"""

import argparse
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
from modeling_flm.hub.records import to_json
from modeling_flm.sampling_flm import PosteriorRefinement
from modeling_flm.trainers import EMACallback, FMLMTrainer, FMLMTrainingArguments


matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))
from peers.masked_diffusion import MaskedDiffusionTrainer, new_masked_model, unmask  # noqa: E402


FORWARD_PASSES = (1, 2, 4, 8, 16)
EMA_DECAY = 0.995

# From tokens, the mask of the known ones, and a limit of forward passes to answers and their numbers of forward passes
Solver = Callable[[torch.LongTensor, torch.BoolTensor, int], tuple[torch.LongTensor, torch.LongTensor]]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, choices=sorted(sudoku.CLUES), default=4, help="side length of the grid")
    parser.add_argument("--num_puzzles", type=int, default=40_000, help="number of training puzzles")
    parser.add_argument("--num_test_puzzles", type=int, default=500, help="number of test puzzles of each difficulty")
    parser.add_argument("--max_steps", type=int, default=6000, help="optimizer steps of each model in total")
    parser.add_argument(
        "--start_steps",
        type=int,
        default=1500,
        help="optimizer steps of the masked model that the flow map starts from",
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="learning rate of masked models; the flow map has half of it"
    )
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument(
        "--commit_threshold",
        type=float,
        default=0.999,
        help="probability at which tokens are committed, for both models",
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/sudoku")
    return parser


def split_grids(size: int, rng: random.Random) -> tuple[list[str] | None, list[str] | None]:
    """Returns disjoint grids for training and testing, or `None` for 9 x 9, where random grids do not repeat."""
    if size > 4:
        return None, None
    grids = sorted(sudoku.solutions("0" * size * size))
    rng.shuffle(grids)
    return grids[48:], grids[:48]


def sample_puzzles(
    number: int, size: int, grids: list[str] | None, difficulties: list[str], rng: random.Random
) -> list[tuple[str, str]]:
    """Returns pairs of a puzzle and a solution, which cycle through the difficulties."""
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
    """Encodes a grid row by row, each as a letter and its digits. Digit n is token n - 1; the letters follow the digits."""
    size = math.isqrt(len(grid))
    rows = [grid[start : start + size] for start in range(0, len(grid), size)]
    return [token for number, row in enumerate(rows) for token in (size + number, *(int(digit) - 1 for digit in row))]


def decode(tokens: list[int]) -> str:
    """Decodes tokens to a grid."""
    size = math.isqrt(len(tokens))
    return "".join(str(token + 1) for index, token in enumerate(tokens) if index % (size + 1))


def is_known(puzzle: str) -> list[bool]:
    """Returns the mask of the known tokens of a puzzle: letters and given cells."""
    return [token >= 0 for token in encode(puzzle)]


def build_dataset(examples: list[tuple[str, str]]) -> Dataset:
    """Returns examples of the solutions, with labels for the blank cells of the puzzles."""
    input_ids = [encode(solution) for _, solution in examples]
    labels = [
        [-100 if known else token for token, known in zip(ids, is_known(puzzle))]
        for ids, (puzzle, _) in zip(input_ids, examples)
    ]
    return Dataset.from_dict({"input_ids": input_ids, "labels": labels})


def training_settings(args: argparse.Namespace, name: str, max_steps: int) -> dict:
    """Returns the settings of all trainings."""
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
    """Trains an FMLM+ without a teacher, from the weights of a masked diffusion model."""
    settings = training_settings(args, name, max_steps)
    training_args = FMLMTrainingArguments.from_preset(
        "any_order",
        **{**settings, "learning_rate": args.learning_rate / 2},
        ema_decay=EMA_DECAY,
        boundary_probability=0.25,
        prompts_from_labels=True,
        prompt_fraction=0.5,  # in the other examples only the puzzle is known
    )
    trainer = FMLMTrainer(FMLMModel.from_masked(start), training_args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()


def train_masked(name: str, max_steps: int, config: FMLMConfig, dataset: Dataset, args: argparse.Namespace):
    """Trains a masked diffusion model."""
    settings = training_settings(args, name, max_steps)
    trainer = MaskedDiffusionTrainer(
        new_masked_model(config),
        TrainingArguments(**settings, remove_unused_columns=False),
        train_dataset=dataset,
        ema=EMACallback(EMA_DECAY),
    )
    trainer.train()
    trainer.save_model()


def trained(
    name: str,
    max_steps: int,
    train: Callable,
    start: FMLMConfig | FLMModel,
    dataset: Dataset,
    args: argparse.Namespace,
) -> FLMModel:
    """Loads the model with this name, and trains it first if it is not there, from a configuration or a model."""
    folder = Path(args.output_dir, name)
    if not (folder / "model.safetensors").is_file():
        print(f"Training {folder}", flush=True)
        set_seed(args.seed)
        begin = time.perf_counter()
        train(name, max_steps, start, dataset, args)
        print(f"{name} took {(time.perf_counter() - begin) / 60:.1f} minutes", flush=True)
    return AutoModel.from_pretrained(folder)


def solvers(flow_map: FMLMModel, masked: FLMModel, args: argparse.Namespace) -> dict[str, Solver]:
    """Returns the methods to compare, by name."""
    generator, device = torch.Generator(), flow_map.device

    def generate(
        input_ids: torch.LongTensor, known: torch.BoolTensor, **options
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        generator.manual_seed(args.seed)
        output = flow_map.generate(
            input_ids,
            prompt_mask=known,
            batch_size=len(input_ids),
            generator=generator,
            return_dict_in_generate=True,
            gamma=0.0,
            **options,
        )
        return output.sequences, output.num_forward_passes

    def flow_map_steps(input_ids, known, limit):
        return generate(input_ids, known, num_steps=limit)

    def refinement(input_ids, known, limit):
        threshold = args.commit_threshold
        return generate(input_ids, known, num_rounds=limit, commit_threshold=threshold, num_steps=1)

    def blocks(input_ids, known, limit):
        num_rows = -(-args.size // limit)
        return generate(input_ids, known, block_length=num_rows * (args.size + 1), num_steps=1)

    def masked_diffusion(input_ids, known, limit):
        rule = PosteriorRefinement(num_rounds=limit, threshold=args.commit_threshold)
        return unmask(masked, input_ids.to(device), known.to(device), rule)

    return {
        "flow map": flow_map_steps,
        "refinement": refinement,
        "blocks": blocks,
        "masked": masked_diffusion,
    }


def measure(methods: dict[str, Solver], examples: list[tuple[str, str]], difficulty: str) -> list[dict]:
    """Measures the fraction of puzzles that each method solves, and its forward passes."""
    input_ids = torch.tensor([encode(solution) for _, solution in examples])
    known = torch.tensor([is_known(puzzle) for puzzle, _ in examples])
    rows = []
    for name, solve in methods.items():
        for limit in FORWARD_PASSES:
            tokens, num_passes = (result.cpu() for result in solve(input_ids * known, known, limit))
            answers = [decode(answer) for answer in tokens.tolist()]
            solved = [sudoku.is_solved(puzzle, answer) for (puzzle, _), answer in zip(examples, answers)]
            cells = (tokens == input_ids)[~known].float().mean().item()
            row = {
                "difficulty": difficulty,
                "method": name,
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
    """Plots the percentage of solved puzzles against forward passes, in a panel for each difficulty."""
    difficulties = list(dict.fromkeys(row["difficulty"] for row in rows))
    num_rows = math.ceil(len(difficulties) / 3)
    figure, axes = plt.subplots(num_rows, 3, figsize=(10.2, 3.4 * num_rows), sharex=True, sharey=True, squeeze=False)
    for axis, difficulty in zip(axes.flat, difficulties):
        for name in dict.fromkeys(row["method"] for row in rows):
            points = [
                (row["forward_passes"], 100 * row["solved"])
                for row in rows
                if (row["difficulty"], row["method"]) == (difficulty, name)
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


def draw_grid(puzzle: str, answer: str, committed: list[bool]) -> str:
    """Formats a grid for the terminal: given cells are bold, committed cells plain, and other cells dim."""
    styles = {"given": "\033[1m{}\033[0m", "known": "\033[0m{}\033[0m", "open": "\033[2m{}\033[0m"}
    if not sys.stdout.isatty():
        styles = {"given": "[{}]", "known": " {} ", "open": " {}?"}
    cells = [
        styles["given" if given != "0" else "known" if known else "open"].format(digit)
        for given, digit, known in zip(puzzle, answer, committed)
    ]
    size = math.isqrt(len(puzzle))
    return "\n".join("    " + " ".join(cells[start : start + size]) for start in range(0, len(cells), size))


def show(flow_map: FMLMModel, puzzle: str, args: argparse.Namespace):
    """Prints how a puzzle is solved, round by round."""
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
    print(f"Training on {len(dataset):,} puzzles of {args.size} x {args.size}. The first one: {examples[0][0]}\n")
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
    print(f"{'difficulty':>10}  {'method':>10}  {'limit':>6}  {'passes':>6}  {'solved':>7}  {'cells':>7}")
    methods = solvers(flow_map, masked, args)
    rows = [row for name, puzzles in tests.items() for row in measure(methods, puzzles, name)]
    Path(args.output_dir, "results.json").write_text(to_json(rows, indent=2) + "\n")
    picture = Path(args.output_dir, "sudoku.png")
    plot(rows, picture)
    print(f"\nPlot: {picture}. How a puzzle is solved; [given] cells, and cells that may still change (?):")
    show(flow_map, tests["hard"][0][0], args)


if __name__ == "__main__":
    main(make_parser().parse_args())
