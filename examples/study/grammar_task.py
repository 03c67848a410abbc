# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Write a task for the lm-evaluation-harness: how does a story of the grammar continue? Three of the four endings are wrong in one
dependency each: the pronoun, the second verb, the color, the thing, the friend or the name.

    python examples/study/grammar_task.py outputs/grammar_task
    python -m modeling_flm.trainers.evaluation.harness --model flm --model_args pretrained=outputs/quickstart/fmlm \
        --tasks grammar --include_path outputs/grammar_task
"""

import argparse
import json
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grammar  # noqa: E402


# The slots whose last word depends on the beginning of the story, with all words that fit the slot.
REPEATED = {
    "PRONOUN": ["she", "he"],
    "SECOND_VERB": list(grammar.VERBS.values()),
    "COLOR": grammar.COLORS,
    "THING": grammar.THINGS,
    "FRIEND": grammar.FRIENDS,
    "NAME": grammar.GIRLS + grammar.BOYS,
}
# Number of words before the pronoun, which are the beginning of the story.
NUM_KNOWN = grammar.TEMPLATE.index("PRONOUN")


def wrong_story(words: list[str], slot: str, rng: random.Random) -> list[str]:
    """Returns a story in which the last word of a slot is replaced by another word of the slot."""
    index = max(number for number, word in enumerate(grammar.TEMPLATE) if word == slot)
    others = [word for word in REPEATED[slot] if word != words[index]]
    return [*words[:index], rng.choice(others), *words[index + 1 :]]


def make_question(rng: random.Random) -> dict:
    """Returns the beginning of a story, four endings in random order, and the index of the right one."""
    words = grammar.sample_story(rng).split()
    stories = [words, *(wrong_story(words, slot, rng) for slot in rng.sample(sorted(REPEATED), 3))]
    order = rng.sample(range(4), 4)
    return {
        "context": " ".join(words[:NUM_KNOWN]),
        "choices": [" ".join(stories[index][NUM_KNOWN:]) for index in order],
        "answer": order.index(0),
    }


def write_task(folder: Path, name: str, questions: list[dict]):
    """
    Writes a multiple-choice task.

    Args:
        folder (`Path`): Folder to write, for `--include_path`.
        name (`str`): Name of the task, for `--tasks`.
        questions (`list[dict]`): Questions with `context`, `choices`, and `answer`, the index of the right choice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n")  # JSON is also YAML


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the task")
    parser.add_argument("--num_questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=99, help="random seed; the quickstart trains on seed 0")
    return parser


def main(args: argparse.Namespace):
    rng = random.Random(args.seed)
    questions = [make_question(rng) for _ in range(args.num_questions)]
    write_task(args.output, "grammar", questions)
    print(f"{args.output}: {len(questions)} questions. The first one:")
    print(json.dumps(questions[0], indent=2))


if __name__ == "__main__":
    main(make_parser().parse_args())
