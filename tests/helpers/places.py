"""Folders of the repository."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
KEPT_MODEL = EXAMPLES / "models" / "words_fmlm"
