# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Sudoku puzzles: those that have one solution, by difficulty, and open ones, which have several.

A puzzle is a string of its cells, row by row, with 0 for blanks: 16 for puzzles of 4 x 4, 81 for 9 x 9.
"""

import math
import random
from collections.abc import Iterator
from functools import cache


# How many of the cells are given, by difficulty and size of the grid. "minimal" puzzles lose their only solution with any
# further cell.
CLUES = {
    4: {"easy": 9, "medium": 7, "hard": 5, "minimal": 0},
    9: {"easy": 45, "medium": 36, "hard": 28, "minimal": 0},
}
# The same of open puzzles: so few that most have many solutions, each of which is right.
OPEN_CLUES = {4: {"open": 2, "empty": 0}, 9: {"open": 12, "empty": 0}}


@cache
def peers(size: int) -> list[list[int]]:
    """For each cell the cells of its row, its column and its box."""
    box = math.isqrt(size)
    place = [(cell // size, cell % size) for cell in range(size * size)]

    def see_each_other(first: int, second: int) -> bool:
        (row, column), (other_row, other_column) = place[first], place[second]
        same_box = (row // box, column // box) == (other_row // box, other_column // box)
        return row == other_row or column == other_column or same_box

    cells = range(size * size)
    return [[other for other in cells if other != cell and see_each_other(cell, other)] for cell in cells]


def solutions(puzzle: str, rng: random.Random | None = None) -> Iterator[str]:
    """
    All solutions of a puzzle, one after the other.

    Args:
        puzzle (`str`): Its cells.
        rng (`random.Random`, *optional*): Puts them into random order.
    """
    size = math.isqrt(len(puzzle))
    cells = [int(digit) for digit in puzzle]
    everything = (2 << size) - 2  # a bit for each digit
    options = [everything] * len(cells)
    for cell, digit in enumerate(cells):
        if digit:
            for other in peers(size)[cell]:
                options[other] &= ~(1 << digit)
    if any(digit and not options[cell] >> digit & 1 for cell, digit in enumerate(cells)):
        return
    yield from _search(cells, options, size, rng)


def _search(cells: list[int], options: list[int], size: int, rng: random.Random | None) -> Iterator[str]:
    blanks = [cell for cell, digit in enumerate(cells) if not digit]
    if not blanks:
        yield "".join(map(str, cells))
        return
    cell = min(blanks, key=lambda blank: options[blank].bit_count())  # where there is least to try
    digits = [digit for digit in range(1, size + 1) if options[cell] >> digit & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        changed = [other for other in peers(size)[cell] if not cells[other] and options[other] >> digit & 1]
        cells[cell] = digit
        for other in changed:
            options[other] &= ~(1 << digit)
        if all(options[other] for other in changed):
            yield from _search(cells, options, size, rng)
        for other in changed:
            options[other] |= 1 << digit
        cells[cell] = 0


def has_one_solution(puzzle: str) -> bool:
    """Whether a puzzle has exactly one solution."""
    found = solutions(puzzle)
    return next(found, None) is not None and next(found, None) is None


def sample_solution(size: int, rng: random.Random) -> str:
    """A filled grid."""
    return next(solutions("0" * size * size, rng))


def make_puzzle(solution: str, num_clues: int, rng: random.Random) -> str:
    """
    A puzzle with this as its only solution.

    Args:
        solution (`str`): A filled grid.
        num_clues (`int`): How many of its cells are given. More are, if the puzzle would have several solutions otherwise.
        rng (`random.Random`): What decides which.
    """
    cells = list(solution)
    for cell in rng.sample(range(len(cells)), len(cells)):
        if sum(digit != "0" for digit in cells) <= num_clues:
            break
        digit, cells[cell] = cells[cell], "0"
        if not has_one_solution("".join(cells)):
            cells[cell] = digit
    return "".join(cells)


def make_open_puzzle(solution: str, num_clues: int, rng: random.Random) -> str:
    """A puzzle with some cells of a filled grid, which may have other solutions as well."""
    given = set(rng.sample(range(len(solution)), num_clues))
    return "".join(digit if cell in given else "0" for cell, digit in enumerate(solution))


def is_solved(puzzle: str, answer: str) -> bool:
    """Whether an answer is a filled grid that obeys the rules and keeps what the puzzle gives."""
    keeps = len(answer) == len(puzzle) and all(given in ("0", digit) for given, digit in zip(puzzle, answer))
    return keeps and "0" not in answer and next(solutions(answer), None) == answer
