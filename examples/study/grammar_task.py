# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
A task for the lm-evaluation-harness, of the grammar's stories: how does a story go on? Of four ends, the three wrong ones break one
dependency each: the pronoun, the second verb, the color or the thing that was found, who thanks, or who is thanked.

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


# What is said twice, with all that can stand there: where the second one is wrong, the story is.
REPEATED = {
    "PRONOUN": ["she", "he"],
    "SECOND_VERB": list(grammar.VERBS.values()),
    "COLOR": grammar.COLORS,
    "THING": grammar.THINGS,
    "FRIEND": grammar.FRIENDS,
    "NAME": grammar.GIRLS + grammar.BOYS,
}
# How many words are given: those before the pronoun
NUM_KNOWN = grammar.TEMPLATE.index("PRONOUN")


def wrong_end(words: list[str], slot: str, rng: random.Random) -> list[str]:
    """A story whose last word for a slot is another one of the same kind."""
    place = max(index for index, word in enumerate(grammar.TEMPLATE) if word == slot)
    others = [word for word in REPEATED[slot] if word != words[place]]
    return [*words[:place], rng.choice(others), *words[place + 1 :]]


def make_question(rng: random.Random) -> dict:
    """The begin of a story, and four ends in random order, of which one is right."""
    words = grammar.sample_story(rng).split()
    ends = [words, *(wrong_end(words, slot, rng) for slot in rng.sample(sorted(REPEATED), 3))]
    order = rng.sample(range(4), 4)
    return {
        "context": " ".join(words[:NUM_KNOWN]),
        "choices": [" ".join(ends[index][NUM_KNOWN:]) for index in order],
        "answer": order.index(0),
    }


def write_task(folder: Path, name: str, questions: list[dict]):
    """
    Writes a task of multiple choice.

    Args:
        folder (`Path`): The folder to write, for `--include_path`.
        name (`str`): The name of the task, for `--tasks`.
        questions (`list[dict]`): Each with its `context`, its `choices` and `answer`, the number of the right one.
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
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n")  # which is YAML, too


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write the task to")
    parser.add_argument("--num_questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=99, help="another than that of training")
    return parser


def main(args: argparse.Namespace):
    rng = random.Random(args.seed)
    questions = [make_question(rng) for _ in range(args.num_questions)]
    write_task(args.output, "grammar", questions)
    print(f"{len(questions)} questions in {args.output}, such as")
    print(json.dumps(questions[0], indent=2))


if __name__ == "__main__":
    main(make_parser().parse_args())
