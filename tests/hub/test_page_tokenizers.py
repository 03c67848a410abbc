"""Tokenizers on the page and in Python: the same tokens for odd texts."""

from tokenizers import pre_tokenizers

from modeling_flm.trainers import train_tokenizer


# Odd texts, and their words and punctuation marks
WORDS = {
    "你好，世界。": ["你好", "，", "世界", "。"],
    "naïve cafe\u0301 !?": ["naïve", "cafe\u0301", "!?"],
    "snake_case, l'été": ["snake_case", ",", "l", "'", "été"],
    "no\u00a0break\u2028line\u0085next": ["no", "break", "line", "next"],
    "zero\u200bwidth": ["zero", "\u200b", "width"],
    "\ufeffmark": ["\ufeff", "mark"],
    "👍🏽 ok": ["👍🏽", "ok"],
    "ไทย हिन्दी ٣٤": ["ไทย", "हिन्दी", "٣٤"],
    "𝔞𝔟 x²": ["𝔞𝔟", "x", "²"],
}


def test_words_are_those_of_whitespace_in_a_form_that_javascript_knows():
    tokenizer = train_tokenizer(WORDS, "word", 100)
    for text, words in WORDS.items():
        assert tokenizer.tokenize(text) == words
        assert [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)] == words
    assert '"Whitespace"' not in tokenizer.backend_tokenizer.to_str()
