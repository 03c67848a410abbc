# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Packing: from texts to blocks of tokens."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from modeling_flm.tokenization_flm import has_characters_only

from .loading import column_names, find_text_column


def pack_tokens(
    token_lists: Iterable[list[int]], block_size: int, bos_token_id: int | None, eos_token_id: int | None
) -> list[list[int]]:
    """
    Packs sequences into blocks ("wrapped" packing): appends EOS to every sequence, concatenates them, and cuts the stream into
    blocks, each with BOS before it and EOS after it. The remainder is dropped.

    Args:
        token_lists (`Iterable[list[int]]`): Tokens of each text.
        block_size (`int`): Length of the blocks, including BOS and EOS.
        bos_token_id (`int`, *optional*): Token at the start of blocks, if any.
        eos_token_id (`int`, *optional*): Token at the end of texts and blocks, if any.

    Returns:
        `list[list[int]]`: blocks of `block_size` tokens.
    """
    begin, end = ([] if token is None else [token] for token in (bos_token_id, eos_token_id))
    stream = list(chain.from_iterable([*tokens, *end] for tokens in token_lists))
    inner = block_size - len(begin) - len(end)
    starts = range(0, len(stream) - inner + 1, inner)
    return [[*begin, *stream[start : start + inner], *end] for start in starts]


def check_texts(texts: list, column: str):
    """Raises a `ValueError` if a column has a value that is not a string."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"`text_column` {column!r} has {text!r}, which is not a string: remove such rows with "
                f"`dataset.filter(lambda row: isinstance(row[{column!r}], str))`."
            )


# Patterns to join, in this order: addresses, tokens without a space before them, tokens without one after them, quotations.
_JOINS = [
    (re.compile(r"(https?) : / / "), r"\1://"),
    (re.compile(" / "), "/"),
    (re.compile(r" (?:([,;:](?= ))|([?!](?= |$))|('(?=\w)))"), r"\1\2\3"),
    (re.compile(r"(?<= )(\w+) \.(?= |$)"), r"\1."),
    (re.compile(r"([$£]) "), r"\1"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    (re.compile(r'" ([^"]+) "'), r'"\1"'),
    (re.compile(r"' ([^']+) '"), r"'\1'"),
]


def detokenize_lm1b(text: str) -> str:
    """
    Undoes most of the tokenization of texts of the One Billion Word benchmark, as the paper does.

    Args:
        text (`str`): A text such as `"He paid $ 5 , and left ."`.

    Returns:
        `str`: the text with usual spacing.
    """
    for pattern, joined in _JOINS:
        text = pattern.sub(joined, text)
    return text


def _pieces(texts: list[str], size: int = 10_000) -> Iterator[str]:
    """Splits very long texts, whose character encodings would take a hundred times their size."""
    for text in texts:
        yield from (text[start : start + size] for start in range(0, len(text), size))


# Functions of texts before tokenization, by name.
PREPROCESSING = {"lm1b": lambda texts: map(detokenize_lm1b, texts), "characters": _pieces}


def pack_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str | None = None,
    num_proc: int | None = None,
    batch_size: int = 1000,
    preprocessing: str | None = None,
    boundaries: bool = True,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset of texts and packs them into blocks of equal length, see [`pack_tokens`]. Samples of a model that was
    trained on blocks are blocks, too, with parts of several texts: for one text a sample use [`pad_dataset`]. `datasets`
    caches the result on disk.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a BOS and an EOS token, or of single characters only, or any tokenizer without `boundaries`.
        block_size (`int`): Length of the blocks.
        text_column (`str`, *optional*): Column of the texts, see [`find_text_column`].
        num_proc (`int`, *optional*): Number of processes. Not for streams.
        batch_size (`int`, *optional*, defaults to 1000):
            Number of texts to concatenate at a time. Each time, less than a block is lost.
        preprocessing (`str`, *optional*):
            `"lm1b"` for texts of the One Billion Word benchmark, see [`detokenize_lm1b`]; `"characters"` for a few very long
            texts with a tokenizer of characters.
        boundaries (`bool`, *optional*, defaults to `True`):
            Whether BOS and EOS tokens mark the start and end of texts and blocks. Without boundaries, texts of exactly the length
            of a block become blocks unchanged.

    Returns:
        A dataset of the type of `dataset` with the single column `input_ids`.
    """
    text_column = find_text_column(dataset, text_column)
    no_boundaries = tokenizer.bos_token_id is None or tokenizer.eos_token_id is None
    if boundaries and no_boundaries and not has_characters_only(tokenizer):
        raise ValueError(
            "`tokenizer` needs a BOS and an EOS token to pack texts: call `add_special_tokens` on it first, or pass "
            "`boundaries=False` to join texts without these."
        )
    boundary_tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id) if boundaries else (None, None)
    if preprocessing is not None and preprocessing not in PREPROCESSING:
        raise ValueError(f"`preprocessing` must be one of {', '.join(PREPROCESSING)}, got {preprocessing!r}.")
    if preprocessing == "characters" and not has_characters_only(tokenizer):
        raise ValueError("`preprocessing='characters'` needs a `tokenizer` of single characters only.")
    if block_size < 3:
        raise ValueError(f"`block_size` must be at least 3, got {block_size}.")

    def tokenize_and_pack(batch: dict[str, list]) -> dict[str, list]:
        texts = batch[text_column]
        check_texts(texts, text_column)
        if preprocessing is not None:
            texts = list(PREPROCESSING[preprocessing](texts))
        # Not `verbose`: it would warn about texts longer than the model.
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": pack_tokens(tokens, block_size, *boundary_tokens)}

    options = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Tokenizing and packing"}
    packed = dataset.map(
        tokenize_and_pack, batched=True, batch_size=batch_size, remove_columns=column_names(dataset), **options
    )
    if not isinstance(packed, IterableDataset) and len(packed) == 0:
        tokens = tokenizer(dataset[text_column][:], add_special_tokens=False, verbose=False)["input_ids"]
        raise ValueError(
            f"The dataset has too few tokens for a single block, {sum(map(len, tokens))} in {len(tokens)} texts: use a `block_size` "
            f"below {block_size}."
        )
    return packed
