"""Puzzles, checked by enumerating all grids; the masked diffusion model; and the example."""

import itertools
import json
import random

import pytest
import sudoku as sudoku_example
import sudoku_puzzles as sudoku
import torch
from example_scripts import run_here
from peers.masked_diffusion import MaskedDiffusionTrainer, masked_logits, new_masked_model, unmask
from small_models import build_flm
from transformers import TrainingArguments

from modeling_flm import FMLMConfig, FMLMModel
from modeling_flm.sampling_flm import PosteriorRefinement


def is_filled(grid: str) -> bool:
    """Checks rows, columns and boxes, independently of the example's code."""
    cells = [[grid[4 * row + column] for column in range(4)] for row in range(4)]
    groups = cells + [list(column) for column in zip(*cells)]
    groups += [[cells[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(sorted(group) == list("1234") for group in groups)


class TestPuzzles:
    grids = ["".join(rows) for rows in itertools.product(map("".join, itertools.permutations("1234")), repeat=4)]
    filled = [grid for grid in grids if is_filled(grid)]

    def test_all_grids_are_found(self):
        assert sorted(sudoku.solutions("0" * 16)) == sorted(self.filled) and len(self.filled) == 288

    @pytest.mark.parametrize("size", [4, 9])
    def test_open_puzzles_have_several_solutions_and_their_number_of_clues(self, size):
        rng = random.Random(0)
        for num_clues in sudoku.OPEN_CLUES[size].values():
            solution = sudoku.sample_solution(size, rng)
            puzzle = sudoku.make_open_puzzle(solution, num_clues, rng)
            assert sum(digit != "0" for digit in puzzle) == num_clues
            assert not sudoku.has_one_solution(puzzle)
            assert sudoku.is_solved(puzzle, solution)
            other = next(each for each in sudoku.solutions(puzzle) if each != solution)
            assert sudoku.is_solved(puzzle, other)

    @pytest.mark.parametrize("difficulty", sudoku.CLUES[4])
    def test_puzzles_have_one_solution_and_their_number_of_clues(self, difficulty):
        rng = random.Random(0)
        for _ in range(20):
            solution = sudoku.sample_solution(4, rng)
            puzzle = sudoku.make_puzzle(solution, sudoku.CLUES[4][difficulty], rng)
            fits = [g for g in self.filled if all(given in ("0", cell) for given, cell in zip(puzzle, g))]
            assert fits == [solution] and sudoku.has_one_solution(puzzle)
            num_clues = 16 - puzzle.count("0")
            assert num_clues >= sudoku.CLUES[4][difficulty]
            if difficulty == "minimal":  # without any clue, the solution is not unique
                spared = [puzzle[:i] + "0" + puzzle[i + 1 :] for i in range(16) if puzzle[i] != "0"]
                assert not any(map(sudoku.has_one_solution, spared))
            elif difficulty != "hard":
                assert num_clues == sudoku.CLUES[4][difficulty]

    def test_puzzles_of_9_by_9(self):
        puzzle = sudoku.make_puzzle(sudoku.sample_solution(9, random.Random(1)), 45, random.Random(2))
        (solution,) = sudoku.solutions(puzzle)
        assert puzzle.count("0") == 36 and sudoku.is_solved(puzzle, solution)

    def test_wrong_answers(self):
        puzzle, solution = "0" * 15 + self.filled[0][15], self.filled[0]
        assert sudoku.is_solved(puzzle, solution)
        assert not sudoku.is_solved(puzzle, solution[:15] + "0")  # a blank is left
        assert not sudoku.is_solved(puzzle, solution[1] + solution[0] + solution[2:])  # against the rules
        other = next(grid for grid in self.filled if grid[15] != solution[15])
        assert not sudoku.is_solved(puzzle, other)  # solves another puzzle
        assert list(sudoku.solutions("11" + "0" * 14)) == [] and not sudoku.has_one_solution("0" * 16)


class TestMaskedDiffusion:
    config = FMLMConfig(
        vocab_size=5,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=4,
        dropout=0.0,
    )

    def test_masked_tokens_are_not_seen_and_known_ones_are_kept(self):
        model = build_flm(vocab_size=6)
        tokens, known = torch.randint(5, (3, 12)), torch.rand(3, 12) < 0.5
        others = torch.where(known, tokens, (tokens + 1) % 5)
        assert torch.equal(masked_logits(model, tokens, known), masked_logits(model, others, known))
        completed, num_passes = unmask(model, tokens, known, PosteriorRefinement(num_rounds=3))
        assert torch.equal(completed[known], tokens[known]) and (num_passes <= 3).all() and (completed < 5).all()
        known[1] = True
        _, num_passes = unmask(model, tokens, known, PosteriorRefinement(num_rounds=3, threshold=1e-6))
        assert num_passes.tolist() == [1, 0, 1]

    def test_learns_a_distribution(self, tmp_path):
        """Of texts "0 0 0 0" (70 %) and "1 1 1 1" (30 %): one known token determines the others."""
        texts = torch.tensor([[0, 0, 0, 0]] * 7 + [[1, 1, 1, 1]] * 3)
        rows = [{"input_ids": text, "labels": text} for text in texts] * 40
        torch.manual_seed(0)
        args = TrainingArguments(
            tmp_path, max_steps=400, per_device_train_batch_size=40, learning_rate=5e-3, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = MaskedDiffusionTrainer(new_masked_model(self.config), args, train_dataset=rows)
        trainer.train()
        model = trainer.model.eval()
        known = torch.tensor([[False] * 4, [False, True, False, False]])
        shares = masked_logits(model, torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), known).softmax(-1)
        assert abs(shares[0, 0, 0] - 0.7) < 0.1 and abs(shares[0, 0, 1] - 0.3) < 0.1
        assert shares[1, [0, 2, 3], 1].min() > 0.9

    def test_has_the_size_of_the_flow_map(self):
        masked, flow_map = new_masked_model(self.config), FMLMModel(self.config)
        own = {name: weight.numel() for name, weight in masked.named_parameters()}
        for name, weight in flow_map.named_parameters():
            if "target_time" not in name:
                assert own[name] - weight.numel() == (
                    32 if name in ("embed_tokens.weight", "lm_head.weight") else "lm_head.bias" == name
                )


def test_known_tokens_are_letters_and_clues():
    solution = "1234341221434321"
    puzzle = "1" + "0" * 14 + "1"
    tokens = sudoku_example.encode(solution)
    assert tokens[:10] == [4, 0, 1, 2, 3, 5, 2, 3, 0, 1] and sudoku_example.decode(tokens) == solution
    assert [n for n, known in enumerate(sudoku_example.is_known(puzzle)) if known] == [0, 1, 5, 10, 15, 19]
    labels = sudoku_example.build_dataset([(puzzle, solution)])[0]["labels"]
    assert [n for n, label in enumerate(labels) if label == -100] == [0, 1, 5, 10, 15, 19]


def test_blocks_keep_to_the_limit():
    config = FMLMConfig(
        vocab_size=18, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=90
    )
    args = sudoku_example.make_parser().parse_args(["--size", "9"])
    solve = sudoku_example.solvers(FMLMModel(config).eval(), None, args)["blocks"]
    tokens = torch.tensor([sudoku_example.encode("0" * 81)])
    known = torch.tensor([sudoku_example.is_known("0" * 81)])
    passes = [solve(tokens * known, known, limit)[1].item() for limit in (1, 2, 4, 8, 16)]
    assert passes == [1, 2, 3, 5, 9]  # blocks of 9, 5, 3, 2 and 1 rows


def test_example(tmp_path, capsys):
    options = [
        "--max_steps",
        3,
        "--start_steps",
        1,
        "--num_puzzles",
        40,
        "--num_test_puzzles",
        4,
        "--batch_size",
        8,
        "--hidden_size",
        32,
    ]
    run_here("sudoku", *options, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 6 * 4 * 5
    assert all(row["forward_passes"] <= row["limit"] for row in rows)
    assert (tmp_path / "sudoku.png").stat().st_size > 10_000
    assert "after forward pass 1" in capsys.readouterr().out
    assert FMLMModel.from_pretrained(tmp_path / "fmlm_plus").config.per_token_timesteps
