# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Serve flow-based models, and any causal language model, over HTTP in the format of OpenAI's completions.

    python examples/serving/serve.py examples/models/words_fmlm
    python examples/serving/serve.py outputs/quickstart/fmlm gpt2 --replicas 2 --max_batch_size 64 --port 8080

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "words_fmlm", "n": 4, "num_steps": 1, "seed": 0}'

Requests name a model by the name of its folder, or by its name on the Hub. README.md in this folder describes requests, limits
and metrics.
"""

import argparse
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from application import run
from transformers import AutoConfig, AutoTokenizer

from modeling_flm.trainers.commands.command_line import check_device, check_model, errors_about, friendly_errors
from modeling_flm.utils_flm import describe_damage


def find_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0. Raises a `ValueError` if it cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            message = f"`port`: cannot listen on {host}:{port} ({error}). Pass another port, or 0 for any free one."
            raise ValueError(message) from error
        return listener.getsockname()[1]


def name_models(paths: list[str]) -> dict[str, str]:
    """Returns the folders of models, or their names on the Hub, by the names that requests use."""
    named = {}
    for path in paths:
        check_model("models", path)
        name = Path(path).resolve().name if Path(path).is_dir() else path
        if name in named:
            raise ValueError(f"`models`: {named[name]} and {path} are both called {name}; rename a folder.")
        named[name] = path
        # Wrong names fail here, before any process starts.
        with errors_about("models", OSError, ValueError):
            AutoConfig.from_pretrained(path)
            AutoTokenizer.from_pretrained(path)
        if damage := next(filter(None, map(describe_damage, Path(path).glob("*.safetensors"))), None):
            raise ValueError(f"`models`: {damage}")
    return named


def bounded(minimum: float, type: Callable = int) -> Callable:
    """Returns a type of flags: numbers that are at least `minimum`, and finite."""

    def parse(text: str) -> float:
        value = type(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {minimum}, got {text}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or Hub names of models")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port, or 0 for any free one")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of the weights")
    add("--replicas", type=bounded(1), default=1, help="number of processes for each model")
    add("--max_batch_size", type=bounded(1), default=32, help="largest number of samples in a batch")
    add(
        "--max_wait_ms",
        type=bounded(0, float),
        default=5.0,
        help="how long a sample waits for others to join its batch",
    )
    add(
        "--max_queue",
        type=bounded(1),
        default=256,
        help="largest number of requests waiting for a model; more get a 429",
    )
    add("--timeout", type=bounded(0.1, float), default=60.0, help="largest number of seconds that a request may take")
    add(
        "--max_texts",
        type=bounded(1),
        default=128,
        help="largest number of samples of a request, over all its prompts",
    )
    add("--max_num_steps", type=bounded(1), default=1024, help="largest number of steps of a request")
    add("--max_body_bytes", type=bounded(1), default=2**20, help="largest size of a request's body")
    return parser


def main(args: argparse.Namespace):
    with friendly_errors(flags=vars(args)):
        check_device("device", args.device)
        models = name_models(args.models)
        args.port = find_port(args.host, args.port)
    run(args, models)


if __name__ == "__main__":
    main(make_parser().parse_args())
