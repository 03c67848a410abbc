# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Sudoku puzzles with one solution, by difficulty, and open puzzles with several.

A puzzle is a string of its cells, row by row, with 0 for blanks: 16 digits for a 4 x 4 puzzle, 81 for 9 x 9.
"""

import math
import random
from collections.abc import Iterator
from functools import cache


# Number of given cells, by size of the grid and difficulty. Without any of its given cells, a "minimal" puzzle has several solutions.
CLUES = {
    4: {"easy": 9, "medium": 7, "hard": 5, "minimal": 0},
    9: {"easy": 45, "medium": 36, "hard": 28, "minimal": 0},
}
# The same for open puzzles, most of which have many solutions.
OPEN_CLUES = {4: {"open": 2, "empty": 0}, 9: {"open": 12, "empty": 0}}


@cache
def peers(size: int) -> list[list[int]]:
    """Returns, for each cell, the other cells of its row, column and box."""
    box = math.isqrt(size)
    position = [(cell // size, cell % size) for cell in range(size * size)]

    def see_each_other(first: int, second: int) -> bool:
        (row, column), (other_row, other_column) = position[first], position[second]
        same_box = (row // box, column // box) == (other_row // box, other_column // box)
        return row == other_row or column == other_column or same_box

    cells = range(size * size)
    return [[other for other in cells if other != cell and see_each_other(cell, other)] for cell in cells]


def solutions(puzzle: str, rng: random.Random | None = None) -> Iterator[str]:
    """
    Yields all solutions of a puzzle.

    Args:
        puzzle (`str`): The puzzle.
        rng (`random.Random`, *optional*): Randomizes their order.
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
    cell = min(blanks, key=lambda blank: options[blank].bit_count())  # the cell with the fewest options
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
    """Returns whether a puzzle has exactly one solution."""
    found = solutions(puzzle)
    return next(found, None) is not None and next(found, None) is None


def sample_solution(size: int, rng: random.Random) -> str:
    """Draws a filled grid."""
    return next(solutions("0" * size * size, rng))


def make_puzzle(solution: str, num_clues: int, rng: random.Random) -> str:
    """
    Makes a puzzle from its only solution.

    Args:
        solution (`str`): A filled grid.
        num_clues (`int`): Number of given cells. There are more if the solution would not be unique otherwise.
        rng (`random.Random`): Chooses the cells.
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
    """Makes a puzzle that may have several solutions, by keeping random cells of a filled grid."""
    given = set(rng.sample(range(len(solution)), num_clues))
    return "".join(digit if cell in given else "0" for cell, digit in enumerate(solution))


def is_solved(puzzle: str, answer: str) -> bool:
    """Returns whether an answer is a filled grid that obeys the rules and keeps the given cells."""
    keeps = len(answer) == len(puzzle) and all(given in ("0", digit) for given, digit in zip(puzzle, answer))
    return keeps and "0" not in answer and next(solutions(answer), None) == answer
