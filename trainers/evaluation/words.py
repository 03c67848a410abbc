# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Words of texts in any script, by Unicode's rules. In scripts without spaces, such as Chinese or Thai, characters count as words."""

import unicodedata

import regex


# Letters that Unicode's rules for word boundaries (UAX 29) do not join: Chinese, Hiragana, Thai, Lao, Khmer, Burmese, ...
_UNSPACED = r"[\p{L}&&\p{Word_Break=Other}]"
_CHARACTER = rf"(?={_UNSPACED})\X\p{{M}}*"
# Letters and digits with their marks. Apostrophes and invisible joiners may be inside a word.
_LETTERS = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}][[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]*+"
_WORD = rf"{_LETTERS}(?:['’\u200c\u200d]{_LETTERS})*+|{_CHARACTER}"
_WORDS = regex.compile(_WORD, regex.V1)
_WORDS_AND_MARKS = regex.compile(rf"{_WORD}|(?!\s)\X", regex.V1)
_SPACED_WORDS = regex.compile(rf"{_CHARACTER}|(?:(?!{_UNSPACED})\S)+", regex.V1)


def split_words(text: str, with_punctuation: bool = False) -> list[str]:
    """
    Returns the words of a text, in lower case and composed characters (NFC).

    Args:
        text (`str`): The text.
        with_punctuation (`bool`, *optional*, defaults to `False`): Whether punctuation marks count as words.
    """
    text = unicodedata.normalize("NFC", text.lower())
    return (_WORDS_AND_MARKS if with_punctuation else _WORDS).findall(text)


def count_words(text: str) -> int:
    """Returns the number of words between spaces, with their punctuation. Characters of scripts without spaces count one each."""
    return sum(len(_SPACED_WORDS.findall(part)) for part in unicodedata.normalize("NFC", text).split())
