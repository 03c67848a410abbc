# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Special tokens for existing tokenizers, and training of small tokenizers.

Not part of Hub repositories: no file that is copied there imports this module.
"""

import re
from collections.abc import Iterable, Iterator
from numbers import Integral

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .pipeline_flm import check_unicode, count_dropped, drops_unknown


# Longest run without spaces, or of spaces, that byte-pair encoding is trained on: its time grows with the square.
_MAX_RUN = 200
_LONG_RUN = re.compile(rf"\S{{{_MAX_RUN}}}(?=\S)|\s{{{_MAX_RUN}}}(?=\s)")


# Words and punctuation marks as split by `pre_tokenizers.Whitespace`, which in JavaScript knows only ASCII words.
_WORD_CHARACTERS = r"\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}"
_WORDS = rf"[{_WORD_CHARACTERS}]+|[^{_WORD_CHARACTERS}\p{{White_Space}}]+"


def has_characters_only(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all tokens are single characters, without special tokens, as for text8."""
    return not tokenizer.all_special_tokens and all(len(token) == 1 for token in tokenizer.get_vocab())


def count_unknown_tokens(
    tokenizer: PreTrainedTokenizerBase, token_lists: Iterable[list[int]], texts: Iterable[str] = ()
) -> int:
    """
    Counts tokens such as `[UNK]`, which stand for characters or words that a tokenizer does not know. There are none if its unknown
    token has another purpose as well, as GPT-2's, which ends texts. If the tokenizer leaves out unknown characters instead, those of
    `texts` are counted.
    """
    if drops_unknown(tokenizer):
        return count_dropped(tokenizer, texts)
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return 0
    return sum(tokens.count(unknown) for tokens in token_lists)


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    Adds missing BOS, EOS and PAD tokens to a tokenizer, as in the paper: BERT's `[CLS]` and `[SEP]` become BOS and EOS, and
    GPT-2 gets a new `[PAD]` (hence its 50258 tokens). A tokenizer with only single characters, as for text8, is not changed.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Changed in place.

    Returns:
        The tokenizer.
    """
    if has_characters_only(tokenizer):
        return tokenizer
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.cls_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise ValueError("`tokenizer` has no BOS and EOS tokens: set its `bos_token` and `eos_token`.")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def _training_texts(texts: Iterable[str], cut: bool) -> Iterator[str]:
    """Checks texts, and cuts their long runs."""
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`texts` has {text!r}, which is not a string: leave it out.")
        check_unicode(text, "texts")
        start = 0
        for run in _LONG_RUN.finditer(text) if cut else ():
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def train_tokenizer(texts: Iterable[str], tokenizer_type: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a small tokenizer, for experiments without a downloaded one.

    Args:
        texts (`Iterable[str]`): The texts to learn the vocabulary from.
        tokenizer_type (`str`):
            `"char"` for characters; `"word"` for words and punctuation marks, decoded with single spaces between them;
            `"bpe"` for byte-level byte-pair encoding, which is lossless; `"text8"` for the letters from a to z and the space,
            for any texts.
        vocab_size (`int`): Maximum vocabulary size, including special tokens. 27 for `"text8"`.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`] with the special tokens `[PAD]`, `[BOS]`, `[EOS]` and `[UNK]`, except for
        `"text8"`, which has no special tokens.
    """
    if isinstance(texts, str) or hasattr(texts, "column_names"):
        raise ValueError(
            f"`texts` must be an iterable of strings, got `{type(texts).__name__}`: pass a list, or a column of a dataset, such as "
            '`dataset["text"]`.'
        )
    if tokenizer_type == "text8":
        vocab = {character: index for index, character in enumerate(" abcdefghijklmnopqrstuvwxyz")}
        tokenizer = Tokenizer(models.WordLevel(vocab))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    special_tokens = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral) or vocab_size <= len(special_tokens):
        raise ValueError(f"`vocab_size` must be an integer above {len(special_tokens)}, got {vocab_size!r}.")
    if tokenizer_type == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(special_tokens) + len(alphabet):
            raise ValueError(
                f"`vocab_size` must be at least {len(special_tokens) + len(alphabet)} for 'bpe', got {vocab_size}."
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        )
    elif tokenizer_type in ("char", "word"):
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        if tokenizer_type == "char":
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
            tokenizer.decoder = decoders.Fuse()
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    else:
        raise ValueError(f"`tokenizer_type` must be 'bpe', 'char', 'word' or 'text8', got {tokenizer_type!r}.")
    tokenizer.train_from_iterator(_training_texts(texts, cut=tokenizer_type == "bpe"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )


__all__ = ["add_special_tokens", "count_unknown_tokens", "has_characters_only", "train_tokenizer"]
