# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
A grammar of short stories, which can be checked word for word.

    mia the brave fox lives in a forest . one morning she finds a red ball and gives the red ball to hugo . hugo thanks mia .

Its long-range dependencies test a language model: names, colors and things are repeated, the pronoun agrees with the name, and the
second verb with the first.

    python examples/grammar.py --num_stories 10
"""

import argparse
import random


GIRLS = ["mia", "anna", "lucy", "emma"]
BOYS = ["tom", "ben", "max", "leo"]
FRIENDS = ["hugo", "nora", "ivan", "rosa"]
TRAITS = ["brave", "shy", "old", "clever"]
ANIMALS = ["fox", "bear", "rabbit", "owl"]
PLACES = ["forest", "village", "castle", "garden"]
TIMES = ["morning", "day", "evening"]
COLORS = ["red", "blue", "green", "golden"]
THINGS = ["ball", "kite", "book", "hat", "bell"]
# The second verb that follows each first verb.
VERBS = {"finds": "gives", "makes": "sends", "buys": "sells"}
THANKS = ["thanks", "hugs", "visits"]

# The words of a story. Capitals mark slots; a slot that occurs twice has the same word in both places.
TEMPLATE = (
    "NAME the TRAIT ANIMAL lives in a PLACE . one TIME PRONOUN VERB a COLOR THING and SECOND_VERB the COLOR THING "
    "to FRIEND . FRIEND THANKS NAME ."
).split()
NUM_WORDS = len(TEMPLATE)

_CHOICES = {
    "NAME": GIRLS + BOYS,
    "TRAIT": TRAITS,
    "ANIMAL": ANIMALS,
    "PLACE": PLACES,
    "TIME": TIMES,
    "VERB": list(VERBS),
    "COLOR": COLORS,
    "THING": THINGS,
    "FRIEND": FRIENDS,
    "THANKS": THANKS,
}


def sample_story(rng: random.Random) -> str:
    """Draws a story uniformly from the grammar."""
    words = {slot: rng.choice(choices) for slot, choices in _CHOICES.items()}
    words["PRONOUN"] = "she" if words["NAME"] in GIRLS else "he"
    words["SECOND_VERB"] = VERBS[words["VERB"]]
    return " ".join(words.get(word, word) for word in TEMPLATE)


def is_valid(story: str) -> bool:
    """Returns whether the grammar generates this story."""
    words = story.split(" ")
    if len(words) != NUM_WORDS:
        return False
    found = {}
    for slot, word in zip(TEMPLATE, words):
        if slot.isupper():
            if found.setdefault(slot, word) != word:
                return False
        elif slot != word:
            return False
    return (
        all(found[slot] in choices for slot, choices in _CHOICES.items())
        and found["PRONOUN"] == ("she" if found["NAME"] in GIRLS else "he")
        and found["SECOND_VERB"] == VERBS[found["VERB"]]
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_stories", type=int, default=1000, help="number of stories, printed one per line")
    parser.add_argument("--seed", type=int, default=99, help="random seed; the quickstart trains on seed 0")
    return parser


def main(args: argparse.Namespace):
    rng = random.Random(args.seed)
    for _ in range(args.num_stories):
        print(sample_story(rng))


if __name__ == "__main__":
    main(make_parser().parse_args())
