# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Invent English-looking words with the small flow map that ships with this repository: all letters of a word in one forward pass.

    python examples/demo.py
    python examples/demo.py --seed 1 --patterns inter... ______ness c_nt_____

The model fills in patterns: `_` is one unknown letter, and `...` is the unknown rest of a word.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_flm import FMLMModel


MODEL = Path(__file__).parent / "models" / "words_fmlm"


def known_tokens(pattern: str, number: int, length: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """
    Returns the arguments of `generate()` for words with some known letters.

    Args:
        pattern (`str`): A word with `_` for unknown letters, or a prefix followed by `...`.
        number (`int`): Number of words to generate.
        length (`int`): Sequence length of the model: a word, an end-of-text token and padding.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A character tokenizer.

    Returns:
        `dict`: `input_ids` and `prompt_mask`.
    """
    letters = pattern.removesuffix("...")
    row = tokenizer(letters.replace("_", "a"), add_special_tokens=False)["input_ids"]
    mask = [int(letter != "_") for letter in letters]
    rest = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (length - len(row) - 1)
    row, mask = row + rest, mask + [int(letters == pattern)] * len(rest)
    return {"input_ids": torch.tensor([row] * number), "prompt_mask": torch.tensor([mask] * number)}


def generate_words(model: FMLMModel, tokenizer: PreTrainedTokenizerBase, **options) -> list[str]:
    """Generates words. `options` are arguments of `generate()`."""
    tokens = model.generate(pad_after_eos=True, **options)
    return ["".join(text.split()) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def show(title: str, words: list[str]):
    """Prints words in columns."""
    print(f"\n{title}\n")
    for start in range(0, len(words), 6):
        print("    " + "".join(f"{word:<17}" for word in words[start : start + 6]).rstrip())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="name or folder of a flow map with a character tokenizer")
    parser.add_argument("--num_samples", type=int, default=24, help="number of words without a pattern")
    parser.add_argument("--num_steps", type=int, default=1, help="forward passes per word")
    parser.add_argument(
        "--patterns",
        nargs="*",
        default=["un...", "photo...", "______ness", "c_nt_____"],
        help="patterns to fill in",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(args: argparse.Namespace):
    model = FMLMModel.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    options = {"num_steps": args.num_steps, "generator": torch.Generator().manual_seed(args.seed)}
    passes = "one forward pass" if args.num_steps == 1 else f"{args.num_steps} forward passes"
    start = time.perf_counter()
    words = generate_words(model, tokenizer, num_samples=args.num_samples, **options)
    seconds = time.perf_counter() - start
    show(f"{len(words)} words, each in {passes}, in {1000 * seconds:.0f} ms on this machine:", words)
    for pattern in args.patterns:
        known = known_tokens(pattern, 12, model.config.max_position_embeddings, tokenizer)
        show(pattern, generate_words(model, tokenizer, **known, **options))


if __name__ == "__main__":
    main(make_parser().parse_args())
