"""Runs the scripts of `examples/`: in this process, where importing torch and transformers again would take ten seconds."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from modeling_flm.trainers.scripts import ScriptParser


EXAMPLES = Path(__file__).parents[2] / "examples"


def run_here(script: str | ModuleType, *arguments):
    """Runs the script with this name in this process, with arguments as on its command line."""
    module = import_module(script) if isinstance(script, str) else script
    parser, arguments = module.make_parser(), list(map(str, arguments))
    if isinstance(parser, ScriptParser):
        module.main(*parser.parse_args_and_config(arguments))
    else:
        module.main(parser.parse_args(arguments))


def run_elsewhere(script: str, *arguments, launcher=(), **options) -> str:
    """Runs it in a process of its own, as a user does; returns what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *launcher, str(EXAMPLES / f"{script}.py"), *map(str, arguments)]
    process = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=280, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout
