# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Compares tokenizers in Python with the same tokenizers on the page, where transformers.js runs them."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .spaces import PAGE


ODD_TEXTS = (
    "你好，世界。",
    "naïve cafe\u0301 l'été don't n't 's !?",
    "snake_case x² ½ room٣٤b 1234",
    "no\u00a0break line\u2028separator zero\u200bwidth\u200djoiner",
    "a\tb\r\nc\n\n d  e   ",
    "ไทย हिन्दी עברית 한국어",
    "👍🏽 👩‍👩‍👧 𝔞𝔟",
    "a\ufeffb",
    "x\x85y",
    "\ufeffc\x85",
    "¡«q»! — “r” … (s) [t] {u} #v @w $x%",
)

# Parts of tokenizers that work differently in JavaScript
_DIFFERENT_PARTS = ("Digits", "Punctuation", "UnicodeScripts")

_SCRIPT = """
const { Tokenizer } = require("@huggingface/tokenizers");
const { module, files, texts, rows } = JSON.parse(require("fs").readFileSync(0, "utf8"));
import("data:text/javascript," + encodeURIComponent(module)).then(({ asInPython }) => {
  const tokenizer = new Tokenizer(...asInPython(...files));
  const encoded = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids);
  const decoded = rows.map((row) => (row.length ? tokenizer.decode(row, { skip_special_tokens: true }) : ""));
  console.log(JSON.stringify([encoded, decoded]));
});
"""


def different_texts(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """
    Returns the texts that a tokenizer encodes or decodes differently on the page, out of odd ones and texts of its own tokens; `None` if
    Node.js and its package `@huggingface/tokenizers` are not there to compare them. Node.js finds packages in the current folder
    and in `NODE_PATH`.
    """
    node = shutil.which("node")
    if node is None:
        return None
    size = len(tokenizer)
    own = [tokenizer.decode(range(start, min(start + 8, size))) for start in range(0, size, max(1, size // 64))]
    texts, rows = [], []
    for text in (*ODD_TEXTS, *own):
        try:
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # of `tokenizers`: text that has no tokens
            continue
        texts.append(text)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [
            json.loads(Path(folder, name).read_text("utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")
        ]
    module = (PAGE / "tokenizer.js").read_text("utf-8")
    arguments = json.dumps({"module": module, "files": files, "texts": texts, "rows": rows})
    result = subprocess.run(
        [node, "-e", _SCRIPT], input=arguments, capture_output=True, encoding="utf-8", env=os.environ
    )
    if "MODULE_NOT_FOUND" in result.stderr:
        return None
    if result.returncode != 0:
        return texts
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text for text, *pairs in zip(texts, rows, decoded, *json.loads(result.stdout)) if pairs[:2] != pairs[2:]]


def tokenizer_warning(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a warning if a tokenizer works differently on the page, else `None`."""
    remedy = "use one of `train_tokenizer`, or encode texts in Python."
    texts = different_texts(tokenizer)
    if texts:
        return f"In a browser the tokenizer reads {len(texts)} of the compared texts differently, such as {texts[0]!r}: {remedy}"
    state = "" if texts is not None else tokenizer.backend_tokenizer.to_str()
    parts = [part for part in _DIFFERENT_PARTS if f'"type":"{part}"' in state]
    if parts:
        return f"In a browser parts of the tokenizer work differently, {', '.join(parts)}: {remedy}"
    return None
