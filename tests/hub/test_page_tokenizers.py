"""Tokenizers on the page and in Python: the same tokens for odd texts."""

import pytest
from places import ROOT
from small_models import build_model
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_flm.hub import export, page_tokenizers
from modeling_flm.hub.page_tokenizers import different_texts, tokenizer_warning
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


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of this library, or one of words whose splitting is replaced."""
    if kind in ("char", "bpe", "word", "text8"):
        return train_tokenizer(WORDS, kind, 400)
    if kind == "bpe of odd spaces":  # its merges depend on what is a space
        return train_tokenizer(
            [*WORDS, *(f"{space}{space} a{space}b{space}" for space in "\x85\ufeff\u2028\t ")], "bpe", 400
        )
    tokenizer = train_tokenizer(WORDS, "word", 400)
    if kind == "Strip":
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
        return tokenizer
    parts = {"Whitespace": pre_tokenizers.Whitespace(), "Punctuation": pre_tokenizers.Punctuation()}
    parts["WhitespaceSplit"] = pre_tokenizers.WhitespaceSplit()
    parts["Digits"] = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Whitespace()])
    tokenizer.backend_tokenizer.pre_tokenizer = parts[kind]
    return tokenizer


@pytest.mark.browser
@pytest.mark.parametrize(
    ("kind", "differs"),
    [
        ("char", False),
        ("bpe", False),
        ("bpe of odd spaces", False),
        ("word", False),
        ("text8", False),
        ("Whitespace", False),
        ("Digits", True),
        ("Punctuation", True),
        ("WhitespaceSplit", True),
        ("Strip", True),
    ],
)
def test_comparison_with_javascript(kind, differs, monkeypatch):
    packages = ROOT / "tests" / "browser" / "node_modules"
    assert packages.is_dir(), "Two packages of npm are missing: see `make test-browser`."
    monkeypatch.setenv("NODE_PATH", str(packages))
    texts = different_texts(make_tokenizer(kind))
    assert bool(texts) == differs, texts
    assert (tokenizer_warning(make_tokenizer(kind)) is not None) == differs


@pytest.mark.parametrize("kind", ["word", "Whitespace", "Digits", "Punctuation"])
def test_parts_that_differ_are_known_without_javascript(kind, monkeypatch):
    monkeypatch.setattr(page_tokenizers.shutil, "which", lambda name: None)
    tokenizer = make_tokenizer(kind)
    assert different_texts(tokenizer) is None
    warning = tokenizer_warning(tokenizer)
    assert warning is None if kind in ("word", "Whitespace") else f", {kind}: use one of `train_tokenizer`" in warning


@pytest.mark.parametrize("is_loaded", [False, True])
def test_exports_warn(is_loaded, monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(export.logger, "warning", lines.append)
    monkeypatch.setattr(export, "compare", lambda *args: 1.0)
    monkeypatch.setattr(export, "_write", lambda step, path: path.touch())
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *args, **options: None)
    monkeypatch.setattr(page_tokenizers, "different_texts", lambda tokenizer: ["你好"])
    tokenizer = make_tokenizer("word")
    model = build_model("fmlm", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    export.export_onnx(model if is_loaded else tmp_path, tmp_path)
    assert len(lines) == 1 and "reads 1 of the compared texts differently, such as '你好'" in lines[0]
