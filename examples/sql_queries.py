# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
SQL queries about a small shop: training texts of different lengths, one per line, and a test that a database decides.

    python examples/sql_queries.py --num_queries 20000 --output_file queries.txt
    flm-train --train_file queries.txt --packing lines --train_tokenizer word --output_dir outputs/sql_flm ...
    flm-evaluate --model outputs/sql_flm --check examples/sql_queries.py:is_executable ...

A query is valid only if all of it agrees: its columns belong to its table, and values are compared with columns of their type.
"""

import argparse
import random
import sqlite3
from pathlib import Path


# The values of each text column; the other columns hold numbers.
TABLES = {
    "products": {
        "name": ["lamp", "chair", "table", "sofa"],
        "category": ["home", "office"],
        "price": None,
        "stock": None,
    },
    "customers": {"name": ["anna", "ben", "carla", "david"], "city": ["rome", "oslo", "paris"], "age": None},
    "orders": {
        "customer": ["anna", "ben", "carla", "david"],
        "product": ["lamp", "chair"],
        "amount": None,
        "year": None,
    },
    "employees": {"name": ["emma", "felix", "greta"], "team": ["sales", "support"], "salary": None, "age": None},
}
NUMBERS = ["5", "10", "20", "50", "100", "500"]
AGGREGATES = ["COUNT", "AVG", "MIN", "MAX", "SUM"]


def sample_query(rng: random.Random) -> str:
    """Draws a query. Its words and signs are separated by spaces."""
    table = rng.choice(list(TABLES))
    columns = list(TABLES[table])
    numbers = [column for column in columns if TABLES[table][column] is None]
    words = ["SELECT"]
    group = None
    kind = rng.random()
    if kind < 0.15:
        words.append("*")
    elif kind < 0.4:
        group = rng.choice(columns)
        words += [group, ",", rng.choice(AGGREGATES), "(", rng.choice(numbers), ")"]
    else:
        words += " , ".join(rng.sample(columns, rng.randint(1, 2))).split()
    words += ["FROM", table]
    for index in range(rng.choice([0, 1, 1, 2])):
        words.append("WHERE" if index == 0 else rng.choice(["AND", "OR"]))
        words += _sample_condition(rng, table, rng.choice(columns))
    if group is not None:
        words += ["GROUP", "BY", group]
    elif rng.random() < 0.4:
        words += ["ORDER", "BY", rng.choice(columns), *rng.choice([[], ["DESC"]])]
    if rng.random() < 0.3:
        words += ["LIMIT", rng.choice(NUMBERS)]
    return " ".join([*words, ";"])


def _sample_condition(rng: random.Random, table: str, column: str) -> list[str]:
    values = TABLES[table][column]
    if values is None:
        return [column, rng.choice(["<", ">", "="]), rng.choice(NUMBERS)]
    return [column, rng.choice(["=", "!="]), "'", rng.choice(values), "'"]


def _make_database() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    for table, columns in TABLES.items():
        types = ", ".join(f"{name} {'INTEGER' if values is None else 'TEXT'}" for name, values in columns.items())
        database.execute(f"CREATE TABLE {table} ({types})")
    return database


_DATABASE = _make_database()


def is_executable(query: str) -> bool:
    """Returns whether SQLite executes the query on the four tables, as one statement with its semicolon."""
    if not query.rstrip().endswith(";") or not query.lstrip().upper().startswith("SELECT"):
        return False
    try:
        _DATABASE.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):  # a `Warning` is for several statements
        return False
    return True


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_queries", type=int, default=20_000, help="number of distinct queries")
    parser.add_argument("--output_file", default="queries.txt")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: argparse.Namespace):
    if not 1 <= args.num_queries <= 100_000:
        raise SystemExit(f"`--num_queries` must be between 1 and 100,000, got {args.num_queries}.")
    rng = random.Random(args.seed)
    drawn: dict[str, None] = {}  # keeps its order
    while len(drawn) < args.num_queries:
        drawn[sample_query(rng)] = None
    queries = rng.sample(list(drawn), len(drawn))  # in the order of drawing, short ones would come first
    Path(args.output_file).write_text("\n".join(queries) + "\n", encoding="utf-8")
    print(f"{len(queries):,} queries in {args.output_file}, such as:", *queries[:3], sep="\n")


if __name__ == "__main__":
    main(make_parser().parse_args())
