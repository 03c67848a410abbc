# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Padding: from texts of different lengths to examples of one text each."""

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_flm.pipeline_flm import count_dropped, drops_unknown, encode_texts
from modeling_flm.tokenization_flm import count_unknown_tokens

from .loading import check_text, column_names, find_text_column
from .packing import check_size, warn_of_unknown


logger = logging.get_logger(__name__)

# Texts to tokenize at a time
_BATCH_SIZE = 1_000


def pad_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    text_column: str | None = None,
    prompt_column: str | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenizes a dataset of texts and makes one example of each: the tokens of the text, EOS, and padding up to `length`. EOS and
    padding are tokens like all others, without an `attention_mask`, so that a model learns where texts end. Texts that do not
    fit are left out, and a warning counts them. `datasets` caches the result on disk.

    To join texts and cut them into blocks instead, use [`pack_dataset`].

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): The texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with an EOS token. Without a padding token, EOS pads.
        length (`int`): Number of tokens of an example, including EOS.
        text_column (`str`, *optional*): Column of the texts, see [`find_text_column`].
        prompt_column (`str`, *optional*):
            Column of prompts, such as questions, to be followed by the texts. Their `labels` are -100: train with
            `prompts_from_labels=True`, which makes them known tokens.
        num_proc (`int`, *optional*): Number of processes. Not for streams.

    Returns:
        A dataset of the type of `dataset` with the column `input_ids`, and `labels` if there are prompts.

    Raises:
        `ValueError`: if the tokenizer has no EOS token, if a text is missing, or if no text fits.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from modeling_flm.trainers import pad_dataset, train_tokenizer

    >>> texts = ["one two", "three"]
    >>> tokenizer = train_tokenizer(texts, "word", vocab_size=100)
    >>> examples = pad_dataset(Dataset.from_dict({"text": texts}), tokenizer, length=4)
    >>> tokenizer.batch_decode(examples["input_ids"][:])
    ['one two [EOS] [PAD]', 'three [EOS] [PAD] [PAD]']
    ```
    """
    text_column = find_text_column(dataset, text_column)
    columns = [text_column]
    if prompt_column is not None:
        columns.insert(0, find_text_column(dataset, prompt_column, "prompt_column"))
    if prompt_column == text_column:
        raise ValueError(f"`prompt_column` and `text_column` are both {text_column!r}: pass two columns.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "`tokenizer` needs an EOS token to mark where texts end: call `add_special_tokens` on it first, or pass one of "
            "`train_tokenizer` (not 'text8', which has no special tokens)."
        )
    check_size(dataset, "length", length, 2)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    is_stream = isinstance(dataset, IterableDataset)

    def tokenize_and_pad(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        arguments = ("prompt_column", "text_column")[-len(columns) :]
        *prompts, texts = [_tokenize(batch[name], name, tokenizer, each) for name, each in zip(columns, arguments)]
        if is_stream and indices[0] == 0:
            num_tokens = sum(map(len, texts)) + len(texts)
            warn_of_unknown(
                tokenizer,
                count_unknown_tokens(tokenizer, texts, batch[text_column]),
                num_tokens,
                f"the first {len(texts)} texts",
            )
        prompts = prompts[0] if prompts else [[]] * len(texts)
        rows = [(prompt, [*text, tokenizer.eos_token_id]) for prompt, text in zip(prompts, texts)]
        fitting = [(prompt, text) for prompt, text in rows if len(prompt) + len(text) <= length]
        if is_stream and len(fitting) < len(rows):
            logger.warning_once(
                f"Texts of more than {length - 1} tokens are left out: pass a larger `length` (in commands `--block_size`) to keep them."
            )
        padding = [[pad_token_id] * (length - len(prompt) - len(text)) for prompt, text in fitting]
        examples = {"input_ids": [prompt + text + pad for (prompt, text), pad in zip(fitting, padding)]}
        if prompt_column is not None:
            examples["labels"] = [[-100] * len(prompt) + text + pad for (prompt, text), pad in zip(fitting, padding)]
        return examples

    options = {"with_indices": True}
    if not is_stream:
        options |= {"num_proc": num_proc, "desc": "Tokenizing and padding"}
    padded = dataset.map(tokenize_and_pad, batched=True, remove_columns=column_names(dataset), **options)
    if is_stream:
        return padded
    if len(padded) > 0 and drops_unknown(tokenizer):
        num_unknown = sum(
            count_dropped(tokenizer, batch[text_column])
            for batch in dataset.select_columns([text_column]).iter(batch_size=_BATCH_SIZE)
        )
        num_tokens = sum((row != pad_token_id).sum() for row in padded.with_format("numpy")["input_ids"])
        warn_of_unknown(tokenizer, num_unknown, num_tokens, f"{len(dataset):,} texts")
    if len(padded) > 0 and count_unknown_tokens(tokenizer, [[tokenizer.unk_token_id]]) > 0:
        tokens = [chunk.flatten().to_numpy() for chunk in padded.data.column("input_ids").chunks]
        num_unknown, num_padding = (
            sum((t == each).sum() for t in tokens) for each in (tokenizer.unk_token_id, pad_token_id)
        )
        warn_of_unknown(tokenizer, num_unknown, sum(map(len, tokens)) - num_padding, f"{len(padded):,} texts")
    num_long = len(dataset) - len(padded)
    remedy = f"pass a `length` of at least {longest_text(dataset, tokenizer, *columns)}" if num_long else ""
    if len(padded) == 0:
        raise ValueError(f"None of the {len(dataset):,} texts fits in {length} tokens with EOS: {remedy}.")
    if num_long:
        logger.warning(
            f"{num_long:,} of {len(dataset):,} texts do not fit in {length} tokens with EOS and are left out: {remedy} (in commands `--block_size`) to keep all."
        )
    return padded


def longest_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *columns: str) -> int:
    """Returns the `length` that [`pad_dataset`] needs to keep all texts: the most tokens of `columns` in a row, plus EOS."""
    longest = 0
    for batch in dataset.select_columns(list(columns)).iter(batch_size=_BATCH_SIZE):
        tokens = [_tokenize(batch[column], column, tokenizer) for column in columns]
        longest = max(longest, *(sum(map(len, row)) for row in zip(*tokens)))
    return longest + 1


def _tokenize(
    texts: list[str], column: str, tokenizer: PreTrainedTokenizerBase, argument: str = "text_column"
) -> list[list[int]]:
    return encode_texts(tokenizer, [check_text(text, column, argument) for text in texts], argument)
