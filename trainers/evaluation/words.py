# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Words of texts in any script, by Unicode's rules. In scripts without spaces, such as Chinese or Thai, characters count as words."""

import unicodedata

import regex


# Letters that Unicode's rules for word boundaries (UAX 29) do not join: Chinese, Hiragana, Thai, Lao, Khmer, Burmese, ...
_UNSPACED = r"[\p{L}&&\p{Word_Break=Other}]"
_CHARACTER = rf"(?={_UNSPACED})\X\p{{M}}*"
# Letters and digits with their marks. Apostrophes and invisible joiners may be inside a word.
_LETTER = rf"[[\p{{L}}\p{{N}}]--{_UNSPACED}]"
_LETTER_OR_MARK = rf"[[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]"
_WORD = rf"{_LETTER}{_LETTER_OR_MARK}*+(?:['\u200c\u200d]{_LETTER_OR_MARK}++)*+|{_CHARACTER}"
_WORDS = regex.compile(_WORD, regex.V1)
_WORDS_AND_MARKS = regex.compile(rf"{_WORD}|(?!\s)\X", regex.V1)
_SPACED_WORDS = regex.compile(rf"{_CHARACTER}|(?:(?!{_UNSPACED})\S)+", regex.V1)
# Soft hyphens, direction marks and word joiners are invisible.
_INVISIBLE = regex.compile(r"\p{Word_Break=Format}")
_APOSTROPHES = str.maketrans("’ʼ", "''")


def split_words(text: str, with_punctuation: bool = False) -> list[str]:
    """
    Returns the words of a text, in lower case and composed characters (NFC), with straight apostrophes and without soft hyphens.

    Args:
        text (`str`): The text.
        with_punctuation (`bool`, *optional*, defaults to `False`): Whether punctuation marks count as words.
    """
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text.lower())).translate(_APOSTROPHES)
    return (_WORDS_AND_MARKS if with_punctuation else _WORDS).findall(text)


def count_words(text: str) -> int:
    """Returns the number of words between spaces, with their punctuation. Characters of scripts without spaces count one each."""
    return sum(len(_SPACED_WORDS.findall(part)) for part in unicodedata.normalize("NFC", text).split())
