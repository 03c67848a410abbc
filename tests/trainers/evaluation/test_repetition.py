"""Repetition: self-BLEU, copies of training texts, and real words."""

import math
import random
import unicodedata

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from modeling_flm.trainers.evaluation import (
    copied_from,
    real_words,
    repetition_figures,
    self_bleu,
)
from modeling_flm.trainers.evaluation.repetition import vocabulary_of
from modeling_flm.trainers.evaluation.words import count_words, split_words


def random_texts(number: int, num_words: int, longest: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [f"w{chr(97 + index)}" for index in range(num_words)]
    return [" ".join(rng.choices(words, k=rng.randint(0, longest))) for _ in range(number)]


def test_split_words():
    text = "It's 3 o’clock, the well-known 'Cat' sat_down!"
    assert split_words(text) == ["it's", "3", "o'clock", "the", "well", "known", "cat", "sat", "down"]
    marks = ["it's", "3", "o'clock", ",", "the", "well", "-", "known", "'", "cat", "'", "sat", "_", "down", "!"]
    assert split_words(text, with_punctuation=True) == marks


@pytest.mark.parametrize(
    "text, words",
    [
        ("我昨天在图书馆，读了。", [*"我昨天在图书馆", *"读了"]),
        ("テレビを見る", ["テレビ", "を", "見", "る"]),
        ("วันนี้", ["วั", "น", "นี้"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("שָׁלוֹם לך", ["שָׁלוֹם", "לך"]),
        ("مَرحبا می\u200cخواهم", ["مَرحبا", "می\u200cخواهم"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("Cafe\u0301 CAFÉ d’où", ["caf\xe9", "caf\xe9", "d'où"]),
        ("п’ять п'ять п\u02bcять", ["п'ять"] * 3),
        ("co\u00adoperate \u200ehe\u200ello foo\u2060bar \ufeffend", ["cooperate", "hello", "foobar", "end"]),
        ("র\u200d\u09cdযাব ශ්\u200dරී", ["র\u200d\u09cdযাব", "ශ්\u200dරී"]),
        ("İstanbul x² ❤️!", ["i\u0307stanbul", "x²"]),
        ("abc我def", ["abc", "我", "def"]),
    ],
)
def test_split_words_of_other_scripts(text, words):
    assert split_words(text) == [unicodedata.normalize("NFC", word) for word in words]
    assert split_words(unicodedata.normalize("NFD", text)) == split_words(text)


@pytest.mark.parametrize(
    "text, number",
    [("It's well-known: 3 cats.", 4), ("我去了，图书馆。", 8), ("नमस्ते दुनिया", 2), (" ", 0), ("go 去 x", 3)],
)
def test_count_words(text, number):
    assert count_words(text) == number


@pytest.mark.parametrize(
    "training, text, sizes, shares",
    [
        # The first 21 of 24 characters are copied: 18 of 21 n-grams of four
        (
            "今天天气很好我们一起去公园散步然后回家吃饭看电视",
            "今天天气很好我们一起去公园散步然后回家吃饭睡觉了",
            (4,),
            [18 / 21, 0],
        ),
        ("วันนี้อากาศดีมากเราไปกันเถอะ", "วันนี้อากาศดีมาก", (4,), [1, 1]),
        ("नमस्ते दुनिया यह अच्छा है", "नमस्ते दुनिया यह बुरा है", (3,), [1 / 3, 0]),
        ("caf\xe9 r\xe9sum\xe9 ici là bas", "cafe\u0301 re\u0301sume\u0301 ici la\u0300 bas", (4,), [1, 1]),
    ],
    ids=["Chinese", "Thai", "Hindi", "NFD"],
)
def test_copies_in_other_scripts(training, text, sizes, shares):
    (figures,) = repetition_figures([[text] * 2], [training], vocabulary_of([training]), sizes, num_resamples=10)
    assert [figures[f"copied_{sizes[0]}"], figures["copied_texts"]] == pytest.approx(shares)
    assert figures["self_bleu"] == pytest.approx(1) and figures["real_words"] > 0.75


class TestSelfBLEU:
    @pytest.mark.parametrize("num_words, longest", [(3, 9), (6, 30), (26, 12)])
    def test_self_bleu_equals_nltk(self, num_words, longest):
        texts = random_texts(40, num_words, longest, seed=longest)
        result = self_bleu(texts)
        filled = [text.split() for text in texts if text]
        expected = [
            sentence_bleu(filled[:index] + filled[index + 1 :], text, smoothing_function=SmoothingFunction().method1)
            for index, text in enumerate(filled)
        ]
        has_words = np.array([bool(text) for text in texts])
        assert not has_words.all() or longest > 20  # some of the short texts are empty
        assert result[has_words, 0] == pytest.approx(expected, rel=1e-9)
        assert 0 < np.mean(expected) < 1 and result[:, 1].tolist() == has_words.astype(float).tolist()

    def test_self_bleu_by_hand(self):
        copies = ["a cat sat on the mat .", "A cat sat on the mat."] * 2
        assert self_bleu(copies)[:, 0] == pytest.approx(1)
        assert self_bleu(["one two three", "four five six"])[:, 0].tolist() == [0, 0]
        # Matches: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, and none of 1 quadruple, which counts as 0.1
        first, _ = self_bleu(["a b c d", "a b c e"])[:, 0]
        assert first == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** (1 / 4))

    def test_self_bleu_needs_two_texts(self):
        assert not self_bleu(["a b", "", "..."[:0]]).any()
        (figures,) = repetition_figures([["only one"]])
        assert math.isnan(figures["self_bleu"])


def contains(training: list[str], words: list[str]) -> bool:
    return any(f" {' '.join(words)} " in f" {' '.join(split_words(text))} " for text in training)


class TestCopies:
    @pytest.mark.parametrize("sizes", [(2, 3), (1, 5), (4,)])
    def test_copied_from_equals_a_search(self, sizes):
        training = random_texts(60, 4, 9, seed=1)
        lists = [random_texts(80, 4, 7, seed=2), [text[3:] for text in training[:20]]]
        results = copied_from(lists, iter(training), sizes)
        for texts, counts in zip(lists, results):
            rows = [split_words(text) for text in texts]
            for size in sizes:
                ngrams = [[row[i : i + size] for i in range(len(row) - size + 1)] for row in rows]
                expected = [[sum(contains(training, ngram) for ngram in row), len(row)] for row in ngrams]
                assert counts[f"copied_{size}"].tolist() == expected
            whole = [[bool(row) and contains(training, row), bool(row)] for row in rows]
            assert counts["copied_texts"].tolist() == whole
        assert 0 < results[0]["copied_texts"][:, 0].sum() < 80

    def test_copied_by_hand(self):
        training = ["The cat sat on the mat, and slept.", "A dog barked"]
        texts = ["the CAT sat on a mat", "dog barked", "on the mat and slept", "dog barked the"]
        (counts,) = copied_from([texts], training, sizes=(3,))
        assert counts["copied_3"].tolist() == [[2, 4], [0, 0], [3, 3], [0, 1]]
        assert counts["copied_texts"][:, 0].tolist() == [0, 1, 1, 0]

    def test_copied_texts_longer_than_ngrams(self):
        training = ["a b c d e f g h i j"]
        (counts,) = copied_from([["b c d e f g", "b c d e f x", "b c d e f g h i j k"]], training, sizes=(2, 4))
        assert counts["copied_texts"][:, 0].tolist() == [1, 0, 0]


def test_real_words():
    vocabulary = vocabulary_of(["Cat", "it's", "3rd", "the mat"])
    assert vocabulary == {"cat", "it's", "the", "mat"}
    counts = real_words(["The cat, 17 czt!", "it's", "12 3", ""], vocabulary)
    assert counts.tolist() == [[2, 3], [1, 1], [0, 0], [0, 0]]


def test_repetition_figures():
    training = ["a b c d", "e f g h"]
    first, second = repetition_figures([["a b c d"] * 9, ["a b c x"] * 9], training, {"a", "b"}, sizes=(2,))
    assert (first["copied_2"], second["copied_2"]) == (1, pytest.approx(2 / 3))
    assert (first["copied_texts"], second["copied_texts"], second["real_words"]) == (1, 0, 0.5)
    assert first["self_bleu"] == 1 and first["self_bleu_interval"] == [1, 1]
    assert repetition_figures([["a b", "c"]])[0].keys() == {"self_bleu", "self_bleu_interval"}
