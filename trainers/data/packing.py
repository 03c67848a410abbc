# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Packing: from texts to blocks of tokens."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from numbers import Integral

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_flm.pipeline_flm import drops_unknown, encode_texts
from modeling_flm.tokenization_flm import count_unknown_tokens, has_characters_only

from .loading import check_text, column_names, find_text_column


logger = logging.get_logger(__name__)


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
    end = [] if eos_token_id is None else [eos_token_id]
    stream = np.fromiter(chain.from_iterable([*tokens, *end] for tokens in token_lists), dtype=np.int64)
    return _cut(stream, block_size, bos_token_id, eos_token_id)[0].tolist()


def _cut(
    stream: np.ndarray, block_size: int, bos_token_id: int | None, eos_token_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream of tokens into blocks. Returns these, of shape `(num_blocks, block_size)`, and the rest of the stream."""
    size = block_size - sum(token is not None for token in (bos_token_id, eos_token_id))
    num_blocks = len(stream) // size
    columns = [stream[: num_blocks * size].reshape(num_blocks, size)]
    if bos_token_id is not None:
        columns.insert(0, np.full((num_blocks, 1), bos_token_id, dtype=stream.dtype))
    if eos_token_id is not None:
        columns.append(np.full((num_blocks, 1), eos_token_id, dtype=stream.dtype))
    return np.concatenate(columns, axis=1), stream[num_blocks * size :]


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
    Tokenizes a dataset of texts and packs them into blocks of equal length, see [`pack_tokens`]. `datasets` caches the
    result on disk. Texts are read in order, and only the remainder at the end is dropped. Special tokens that stand in a text, such
    as `[EOS]`, are text.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a BOS and an EOS token, or of single characters only, or any tokenizer without `boundaries`.
        block_size (`int`): Length of the blocks.
        text_column (`str`, *optional*): Column of the texts, see [`find_text_column`].
        num_proc (`int`, *optional*): Number of processes that tokenize. It does not change the blocks. Not for streams.
        batch_size (`int`, *optional*, defaults to 1000): Number of texts to tokenize at a time. It does not change the blocks.
        preprocessing (`str`, *optional*):
            `"lm1b"` for texts of the One Billion Word benchmark, see [`detokenize_lm1b`]; `"characters"` for a few very long
            texts with a tokenizer of characters.
        boundaries (`bool`, *optional*, defaults to `True`):
            Whether BOS and EOS tokens mark the start and end of texts and blocks. Without boundaries, texts of exactly the length
            of a block become blocks unchanged.

    Returns:
        A dataset of the type of `dataset` with the single column `input_ids`. The `state_dict` of a stream can be restored in the same
        process; elsewhere skip the blocks that were read, `dataset.skip(number)`.
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
    check_size(dataset, "block_size", block_size, 3)

    end = [] if boundary_tokens[1] is None else [boundary_tokens[1]]
    rests: dict[int, np.ndarray] = {}

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [check_text(text, text_column) for text in batch[text_column]]
        if preprocessing is not None:
            texts = list(PREPROCESSING[preprocessing](texts))
        rows = encode_texts(tokenizer, texts, "text_column")
        return {
            "tokens": [np.array([*tokens, *end], dtype=np.int32) for tokens in rows],
            # of the batch, in its first row
            "num_unknown": [count_unknown_tokens(tokenizer, rows, texts), *[0] * len(rows)][: len(rows)],
        }

    def pack(tokens: list[np.ndarray], indices: list[int]) -> dict[str, list]:
        # The rest of the batch before. Every pass over a stream writes it anew before it is read.
        rest = np.empty(0, dtype=np.int32) if indices[0] == 0 else rests.get(indices[0])
        if rest is None:
            raise ValueError(
                "A packed stream cannot be restored from a `state_dict` of another process, which lacks the tokens that the batch before "
                "left over: skip the blocks that were read, `dataset.skip(number)`, or resume by the trainer, which does that."
            )
        blocks, rest = _cut(np.concatenate([rest, *tokens]), block_size, *boundary_tokens)
        rests.pop(indices[-1] + 1, None)
        rests[indices[-1] + 1] = rest.copy()
        if len(rests) > 100:
            del rests[next(iter(rests))]
        return {"input_ids": blocks.tolist()}

    def tokenize_and_pack(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        tokenized = tokenize(batch)
        if indices[0] == 0:
            num_tokens = sum(map(len, tokenized["tokens"]))
            warn_of_unknown(tokenizer, sum(tokenized["num_unknown"]), num_tokens, f"the first {len(indices)} texts")
        return pack(tokenized["tokens"], indices)

    def pack_table(table: pa.Table, indices: list[int]) -> dict[str, list]:
        return pack([table["tokens"].combine_chunks().flatten().to_numpy()], indices)

    options = {"batched": True, "batch_size": batch_size}
    columns = column_names(dataset)
    if isinstance(dataset, IterableDataset):
        return dataset.map(tokenize_and_pack, with_indices=True, remove_columns=columns, **options)
    tokenized = dataset.map(tokenize, remove_columns=columns, num_proc=num_proc, desc="Tokenizing", **options)
    packed, num_tokens = tokenized, 0
    if len(tokenized) > 0:
        num_tokens = sum(len(chunk.flatten()) for chunk in tokenized.data.column("tokens").chunks)
        num_unknown = int(tokenized.data.column("num_unknown").to_numpy().sum())
        warn_of_unknown(tokenizer, num_unknown, num_tokens, f"{len(dataset):,} texts")
        options |= {"with_indices": True, "remove_columns": tokenized.column_names, "desc": "Packing"}
        packed = tokenized.with_format("arrow").map(pack_table, **options).with_format(None)
    if len(packed) == 0:
        longest = num_tokens + sum(token is not None for token in boundary_tokens)
        raise ValueError(
            f"The dataset has too few tokens for a single block, {num_tokens} in {len(dataset)} texts: use a `block_size` of at most "
            f"{longest}."
        )
    return packed


def check_size(dataset: Dataset | IterableDataset, name: str, size: int, minimum: int):
    """Raises a `ValueError` if the size of examples is too small or no integer, or if there are no texts to make them from."""
    if isinstance(size, bool) or not isinstance(size, Integral) or size < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {size!r}.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` is empty: pass texts.")


def warn_of_unknown(tokenizer: PreTrainedTokenizerBase, num_unknown: int, num_tokens: int, texts: str):
    """Warns about tokens that stand for unknown text."""
    if num_unknown > 0 and drops_unknown(tokenizer):
        logger.warning(
            f"{num_unknown / (num_unknown + num_tokens):.2%} of the tokens of {texts} are missing: the tokenizer leaves out characters that it "
            "does not know. A tokenizer of bytes ('bpe') knows all."
        )
    elif num_unknown > 0:
        logger.warning(
            f"{num_unknown / num_tokens:.2%} of the tokens of {texts} are {tokenizer.unk_token}: the tokenizer does not know their words or "
            "characters. A larger vocabulary, or a tokenizer of bytes ('bpe'), loses less."
        )
