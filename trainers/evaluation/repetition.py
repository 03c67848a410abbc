# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Repetition: self-BLEU, copies of training data, and the share of dictionary words. Words are those of [`split_words`]: in scripts
without spaces, such as Chinese or Thai, they are characters.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from tqdm.auto import tqdm

from .bootstrap import bootstrap_ratio
from .words import split_words


NGRAM_SIZES = (4, 8)


def _ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def self_bleu(texts: Sequence[str], max_size: int = 4) -> np.ndarray:
    r"""
    Returns self-BLEU: the BLEU of each text with all other texts as references. It is 1 if every text occurs twice.

    Self-BLEU grows with the number of texts, so compare equal numbers. Words and punctuation marks count, all n-gram sizes have
    equal weight, and a size without a match counts as 0.1 matches (smoothing method 1 of Chen and Cherry, 2014, as in Texygen).
    The time is linear in the number of texts: the largest count of an n-gram in the *other* texts is its largest count in all
    texts, or the second largest for the text that has the largest.

    Args:
        texts (`Sequence[str]`): The texts. Texts without words are skipped; all are if fewer than two have words.
        max_size (`int`, *optional*, defaults to 4): Longest n-grams.

    Returns:
        `np.ndarray` of shape `(num_texts, 2)`: the BLEU of each text, and 1; or 0 and 0 for a skipped text.
    """
    words = [split_words(text, with_punctuation=True) for text in texts]
    lengths = np.array([len(row) for row in words])
    filled = np.flatnonzero(lengths)
    result = np.zeros((len(texts), 2))
    if len(filled) < 2:
        return result
    logs, matched = np.zeros(len(texts)), np.ones(len(texts), dtype=bool)
    for size in range(1, max_size + 1):
        counters = {index: Counter(_ngrams(words[index], size)) for index in filled}
        # Largest count of each n-gram, the text that has it, and the second largest count
        largest: dict[tuple[str, ...], tuple[int, int, int]] = {}
        for index, counter in counters.items():
            for ngram, count in counter.items():
                first, owner, second = largest.get(ngram, (0, -1, 0))
                largest[ngram] = (count, index, first) if count > first else (first, owner, max(second, count))
        for index, counter in counters.items():
            matches = 0
            for ngram, count in counter.items():
                first, owner, second = largest[ngram]
                matches += min(count, second if owner == index else first)
            if size == 1 and matches == 0:
                matched[index] = False
            logs[index] += math.log((matches or 0.1) / max(1, lengths[index] - size + 1)) / max_size
    by_length = Counter(lengths[filled].tolist())
    for index in filled:
        length = int(lengths[index])
        others = [other for other, number in by_length.items() if other != length or number > 1]
        closest = min(others, key=lambda other: (abs(other - length), other))
        penalty = min(0.0, 1 - closest / length)
        result[index] = (math.exp(logs[index] + penalty) if matched[index] else 0.0), 1
    return result


def copied_from(
    text_lists: Sequence[Sequence[str]], training_texts: Iterable[str], sizes: Sequence[int] = NGRAM_SIZES
) -> list[dict[str, np.ndarray]]:
    """
    Counts what texts copy from training texts word for word, in lower case and without punctuation. The training texts are read
    once and not kept, so they may be a stream.

    Args:
        text_lists (`Sequence[Sequence[str]]`): Lists of texts, such as one for each number of steps.
        training_texts (`Iterable[str]`): The training texts.
        sizes (`Sequence[int]`, *optional*, defaults to `(4, 8)`): N-gram sizes, in words.

    Returns:
        `list[dict[str, np.ndarray]]`: arrays of shape `(num_texts, 2)` for each list. `copied_N` has the number of a text's
        N-grams that occur in a training text, and its number of N-grams. `copied_texts` has 1 if the whole text is part of one
        training text, and 1 if it has words.
    """
    words = [[tuple(split_words(text)) for text in texts] for texts in text_lists]
    wanted = {size: {ngram for rows in words for row in rows for ngram in _ngrams(row, size)} for size in sizes}
    found: dict[int, set] = {size: set() for size in sizes}
    # A whole text is looked up by its first words, as many as the longest n-gram has.
    longest = max(sizes, default=8)
    whole: dict[int, dict[tuple, set]] = defaultdict(lambda: defaultdict(set))
    for row in {row for rows in words for row in rows if row}:
        size = min(len(row), longest)
        whole[size][row[:size]].add(row)
    copied = set()
    for text in tqdm(training_texts, desc="Training texts", unit="text"):
        training = tuple(split_words(text))
        for size in sorted(wanted.keys() | whole.keys()):
            here, starts = wanted.get(size, set()), whole.get(size, {})
            for position, ngram in enumerate(_ngrams(training, size)):
                if ngram in here:
                    found[size].add(ngram)
                for row in list(starts.get(ngram, ())):
                    if training[position : position + len(row)] == row:
                        copied.add(row)
                        starts[ngram].discard(row)  # found once is enough
    results = []
    for rows in words:
        counts = {}
        for size in sizes:
            ngrams = [_ngrams(row, size) for row in rows]
            counts[f"copied_{size}"] = np.array([[sum(n in found[size] for n in row), len(row)] for row in ngrams])
        counts["copied_texts"] = np.array([[row in copied, len(row) > 0] for row in rows], dtype=int)
        results.append(counts)
    return results


def _is_alphabetic(word: str) -> bool:
    return not any(character.isdigit() for character in word)


def vocabulary_of(texts: Iterable[str]) -> set[str]:
    """Returns the words of a word list or of training texts, in lower case and without numbers."""
    return {word for text in texts for word in split_words(text) if _is_alphabetic(word)}


def real_words(texts: Sequence[str], vocabulary: Collection[str]) -> np.ndarray:
    """
    Counts the words of each text that are in a vocabulary. Numbers are ignored.

    Args:
        texts (`Sequence[str]`): The texts.
        vocabulary (`Collection[str]`): Words in lower case, from [`vocabulary_of`].

    Returns:
        `np.ndarray` of shape `(num_texts, 2)`: the number of words in the vocabulary, and of all words.
    """
    counts = np.zeros((len(texts), 2), dtype=int)
    for index, text in enumerate(texts):
        words = [word for word in split_words(text) if _is_alphabetic(word)]
        counts[index] = sum(word in vocabulary for word in words), len(words)
    return counts


def repetition_figures(
    text_lists: Sequence[Sequence[str]],
    training_texts: Iterable[str] | None = None,
    vocabulary: Collection[str] | None = None,
    sizes: Sequence[int] = NGRAM_SIZES,
    num_resamples: int = 1000,
) -> list[dict[str, float | list[float]]]:
    """
    Measures self-BLEU, copies of training texts and real words. Shows its progress.

    Args:
        text_lists (`Sequence[Sequence[str]]`): Lists of texts, such as one for each number of steps.
        training_texts (`Iterable[str]`, *optional*): Training texts, which are read once. By default copies are not counted.
        vocabulary (`Collection[str]`, *optional*): Real words, in lower case. By default real words are not counted.
        sizes (`Sequence[int]`, *optional*, defaults to `(4, 8)`): N-gram sizes of copies, in words.
        num_resamples (`int`, *optional*, defaults to 1000): Bootstrap resamples for the 95 % intervals.

    Returns:
        `list[dict[str, float | list[float]]]`: columns for the row of each list: `self_bleu`; `copied_N` for each size and
        `copied_texts`, if there are training texts; `real_words`, if there is a vocabulary; and the interval of each, such as
        `self_bleu_interval`.
    """
    counts = [{"self_bleu": self_bleu(texts)} for texts in tqdm(text_lists, desc="Self-BLEU", unit="list")]
    if training_texts is not None:
        counts = [row | copies for row, copies in zip(counts, copied_from(text_lists, training_texts, sizes))]
    if vocabulary is not None:
        counts = [row | {"real_words": real_words(texts, vocabulary)} for row, texts in zip(counts, text_lists)]
    figures = []
    for row in counts:
        figures.append({})
        for name, values in row.items():
            figures[-1][name], figures[-1][f"{name}_interval"] = bootstrap_ratio(*values.T, num_resamples)
    return figures
