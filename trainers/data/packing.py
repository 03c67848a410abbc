# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""From texts to blocks of tokens: undoing a tokenization, tokenizing, packing."""

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
    Wrapped packing: appends EOS to every text, concatenates them, cuts the stream into blocks, and puts BOS before and
    EOS after each, which makes `block_size` tokens. The remainder is dropped.

    Args:
        token_lists (`Iterable[list[int]]`): The tokens of each text.
        block_size (`int`): The length of the blocks, at least 1 without BOS and EOS.
        bos_token_id (`int`, *optional*): The token that begins a block. Nothing marks beginnings if `None`.
        eos_token_id (`int`, *optional*): The token that ends texts and blocks. Nothing marks ends if `None`.

    Returns:
        `list[list[int]]`: blocks of `block_size` tokens.
    """
    begin, end = ([] if token is None else [token] for token in (bos_token_id, eos_token_id))
    stream = list(chain.from_iterable([*tokens, *end] for tokens in token_lists))
    inner = block_size - len(begin) - len(end)
    starts = range(0, len(stream) - inner + 1, inner)
    return [[*begin, *stream[start : start + inner], *end] for start in starts]


# What joins on again, in this order: addresses, what follows without a space, what precedes without one, and quotations.
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
    Undoes, as the paper does, most of the tokenization that the texts of the One Billion Word benchmark come in.

    Args:
        text (`str`): A text such as `"He paid $ 5 , and left ."`.

    Returns:
        `str`: the text as one would write it.
    """
    for pattern, joined in _JOINS:
        text = pattern.sub(joined, text)
    return text


def _pieces(texts: list[str], size: int = 10_000) -> Iterator[str]:
    """Very long texts of characters, a chunk at a time: their encodings are a hundred times their size."""
    for text in texts:
        yield from (text[start : start + size] for start in range(0, len(text), size))


# What can happen to texts before they are tokenized.
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
    Tokenizes a dataset of texts and packs them into blocks of equal length, see [`pack_tokens`]. `datasets` caches the
    result on disk.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a BOS and an EOS token, or of single characters and nothing else, or any without `boundaries`.
        block_size (`int`): The length of the blocks.
        text_column (`str`, *optional*): The column with the texts, see [`find_text_column`].
        num_proc (`int`, *optional*): The number of processes. Not for streams.
        batch_size (`int`, *optional*, defaults to 1000):
            How many texts are concatenated. Less than a block is lost for every so many texts.
        preprocessing (`str`, *optional*):
            `"lm1b"` for texts of the One Billion Word benchmark, see [`detokenize_lm1b`]; `"characters"` for a few very
            long texts and a tokenizer of characters.
        boundaries (`bool`, *optional*, defaults to `True`):
            Whether BOS and EOS tokens mark where texts and blocks begin and end. Without them texts that are as long as a
            block are blocks as they are.

    Returns:
        A dataset like `dataset` with the single column `input_ids`.
    """
    text_column = find_text_column(dataset, text_column)
    no_boundaries = tokenizer.bos_token_id is None or tokenizer.eos_token_id is None
    if boundaries and no_boundaries and not has_characters_only(tokenizer):
        raise ValueError(
            "`tokenizer` needs a BOS and an EOS token to pack texts: pass it through `add_special_tokens` first, or "
            "`boundaries=False` to join texts without."
        )
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id) if boundaries else (None, None)
    if preprocessing is not None and preprocessing not in PREPROCESSING:
        raise ValueError(f"`preprocessing` must be one of {', '.join(PREPROCESSING)}, got {preprocessing!r}.")
    if preprocessing == "characters" and not has_characters_only(tokenizer):
        raise ValueError("`preprocessing='characters'` is for a `tokenizer` of single characters and nothing else.")
    if block_size < 3:
        raise ValueError(f"`block_size` must be at least 3, got {block_size}.")

    def tokenize_and_pack(batch: dict[str, list]) -> dict[str, list]:
        texts = batch[text_column]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(
                    f"`text_column` {text_column!r} has {text!r}, which is not a text: leave such rows out, with "
                    f"`dataset.filter(lambda row: isinstance(row[{text_column!r}], str))`."
                )
        if preprocessing is not None:
            texts = list(PREPROCESSING[preprocessing](texts))
        # `verbose`: a text may well be longer than a block.
        tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": pack_tokens(tokens, block_size, *marks)}

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
