"""Files and folders that are written: the umask decides who may read them."""

import os
from pathlib import Path

import huggingface_hub.constants
import pytest
from places import ROOT
from small_models import build_flm

from modeling_flm.hub.convert import main as convert
from modeling_flm.hub.publish import assemble
from modeling_flm.hub.spaces import assemble_space
from modeling_flm.trainers import train_tokenizer


RELEASED = ROOT / "tests" / "fixtures" / "released"


def modes(folder: Path) -> set[int]:
    """The modes of the files in a folder, and of the folder and its folders without their bits for searching."""
    return {path.stat().st_mode & 0o666 for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_umask(mask, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = os.umask(mask)
    try:
        tokenizer = train_tokenizer([" ".join(f"w{n}" for n in range(50))], "word", vocab_size=53)
        tokenizer.save_pretrained(tmp_path / "model")
        build_flm(vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / "model")
        assemble(tmp_path / "model", tmp_path / "published", "me/tiny", check=False)
        assemble_space(tmp_path / "space", "me/tiny")
        convert(["--checkpoint", str(RELEASED / "flm_hub"), "--output", str(tmp_path / "converted")])
    finally:
        os.umask(before)
    for name in ("model", "published", "space", "converted"):
        assert modes(tmp_path / name) == {0o666 & ~mask}, name
