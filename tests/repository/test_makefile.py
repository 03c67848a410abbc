"""The targets of the Makefile install what they need and no more."""

import subprocess
from pathlib import Path

import pytest
from places import ROOT


def commands(target: str, environment: Path) -> str:
    """The commands that `make` would run with this virtual environment."""
    dry_run = ["make", "--dry-run", target, f"VENV={environment}"]
    return subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target, extra", [("demo", "onnx"), ("quickstart", "quickstart"), ("test", "dev")])
def test_a_target_installs_its_extra_unless_it_is_there(target, extra, tmp_path):
    assert f'--editable ".[{extra}]"' in commands(target, tmp_path)
    for installed in (extra, "dev"):  # dev includes the other extras
        marker = tmp_path / f".installed-{installed}"
        marker.touch()
        assert "pip" not in commands(target, tmp_path).replace(str(tmp_path), "")
        marker.unlink()
