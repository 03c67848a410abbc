"""
Runs commands of the package and scripts of `examples/`: in this process, which saves ten seconds of imports, or in another one.
"""

import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from places import EXAMPLES

from modeling_flm.trainers.commands.command_line import ScriptParser


def run_here(script: str | ModuleType, *arguments):
    """Runs a command or script in this process, with the arguments of its command line."""
    arguments = list(map(str, arguments))
    if isinstance(script, str) and script.startswith("flm-"):
        (command,) = entry_points(group="console_scripts", name=script)
        return command.load()(arguments)
    module = import_module(script) if isinstance(script, str) else script
    parser = module.make_parser()
    if isinstance(parser, ScriptParser):
        module.main(*parser.parse_args_and_config(arguments))
    else:
        module.main(parser.parse_args(arguments))


def run_elsewhere(script: str, *arguments, launcher=(), **options) -> str:
    """Runs a command or script in its own process, and returns its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not script.startswith("flm-"):
        command = [sys.executable, *launcher, str(EXAMPLES / f"{script}.py")]
    elif launcher:
        (command,) = entry_points(group="console_scripts", name=script)
        command = [sys.executable, *launcher, "-m", command.module]
    else:
        command = [str(Path(sys.executable).with_name(script))]
    process = subprocess.run(
        [*command, *map(str, arguments)], env=environment, text=True, capture_output=True, timeout=280, **options
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
