"""
Processes with the environment of `accelerate launch`, forked from one that has imported everything, since imports in every
process and in the launcher would take most of the time of a test.
"""

import importlib
import multiprocessing
import os
import socket
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from places import EXAMPLES, ROOT


RECIPES = EXAMPLES / "recipes"

_CONTEXT = multiprocessing.get_context("forkserver")
# Modules with functions that are called
_CONTEXT.set_forkserver_preload(
    [
        "train_tiny",
        "tests.modeling_flm.test_known_tokens",
        "tests.trainers.commands.test_generate_command",
        "tests.trainers.test_flm_trainer",
    ]
)


def launcher_flags(num_processes: int = 2, fsdp: bool = False) -> list[str]:
    """The flags of `accelerate launch` for this number of processes on the CPU."""
    # `--multi_gpu` is for several processes of any kind; with `--cpu` accelerate starts a single one.
    kind = ["--config_file", str(RECIPES / "fsdp.yaml")] if fsdp else ["--multi_gpu"]
    flags = ["--num_processes", str(num_processes), *kind, "--num_machines", "1"]
    return [*flags, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launcher(num_processes: int = 2, fsdp: bool = False) -> list[str]:
    """The arguments of Python that start a script in this number of processes."""
    return ["-m", "accelerate.commands.launch", *launcher_flags(num_processes, fsdp)]


def _environment(num_processes: int, fsdp: bool) -> dict[str, str]:
    """The variables that `accelerate launch` adds to the environment of all processes."""
    args = launch_command_parser().parse_args([*launcher_flags(num_processes, fsdp), "script.py"])
    args, *_ = _validate_launch_command(args)
    environment = prepare_multi_gpu_env(args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def _call(module: str, name: str, arguments: tuple, environment: dict[str, str]):
    os.environ.update(environment)
    getattr(importlib.import_module(module), name)(*arguments)


def run_processes(function, *arguments, num_processes: int = 2, fsdp: bool = False):
    """Calls a function of a module in several processes, with arguments that can be pickled. Fails if one of them fails."""
    environment = _environment(num_processes, fsdp) if num_processes > 1 else {}
    path = os.environ.get("PYTHONPATH")
    # The first call starts the process that all others are forked from.
    here = os.pathsep.join([str(Path(__file__).parent), str(ROOT), str(EXAMPLES)])
    os.environ["PYTHONPATH"] = here if path is None else f"{here}{os.pathsep}{path}"
    try:
        processes = []
        for rank in range(num_processes):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            call = (function.__module__, function.__name__, arguments, own)
            processes.append(_CONTEXT.Process(target=_call, args=call))
            processes[-1].start()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path
    for process in processes:
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * num_processes
