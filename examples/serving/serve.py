# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Texts over HTTP, in the shape of OpenAI's completions: flow-based models, and any causal language model beside them.

    python examples/serving/serve.py examples/models/words_fmlm
    python examples/serving/serve.py outputs/quickstart/fmlm gpt2 --replicas 2 --max_batch_size 64 --port 8080

    curl http://127.0.0.1:8000/v1/completions -d '{"model": "words_fmlm", "n": 4, "num_steps": 1, "seed": 0}'

Ray Serve runs the processes: one that answers HTTP, and `--replicas` of each model, which write the texts of concurrent requests
together. A model goes by the name of its folder, or on the Hub. README.md says more.
"""

import argparse
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from application import run
from transformers import AutoConfig, AutoTokenizer

from modeling_flm.trainers.commands.command_line import check_device, check_model, explained


def find_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises a `ValueError` if it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"`port`: cannot listen on {host}:{port} ({error}). Pass another one, or 0 for a free one."
            ) from error
        return listener.getsockname()[1]


def name_models(paths: list[str]) -> dict[str, str]:
    """The models' folders or names on the Hub, by the names that requests know them by."""
    named = {}
    for path in paths:
        check_model("`models`", path)
        name = Path(path).resolve().name if Path(path).is_dir() else path
        if name in named:
            raise ValueError(f"`models`: {named[name]} and {path} are both called {name}; rename a folder.")
        named[name] = path
        # What is wrong with a name is said here, before any process starts.
        AutoConfig.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
    return named


def at_least(least: float, kind: Callable = int) -> Callable:
    """A type of flags: numbers that are not below the least one."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names or folders of models")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="the port, or 0 for a free one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--replicas", type=at_least(1), default=1, help="of each model")
    parser.add_argument("--max_batch_size", type=at_least(1), default=32, help="texts that are written together")
    parser.add_argument(
        "--max_wait_ms", type=at_least(0, float), default=5.0, help="how long a text waits for others to join it"
    )
    parser.add_argument(
        "--max_queue", type=at_least(1), default=256, help="requests that wait for a model; more get a 429"
    )
    parser.add_argument("--timeout", type=at_least(0.1, float), default=60.0, help="seconds that a request may take")
    parser.add_argument(
        "--max_texts", type=at_least(1), default=128, help="texts of a request, all its prompts together"
    )
    parser.add_argument("--max_num_steps", type=at_least(1), default=1024)
    parser.add_argument("--max_body_bytes", type=at_least(1), default=2**20)
    return parser


def main(args: argparse.Namespace):
    with explained(flags=vars(args)):
        check_device("--device", args.device)
        models = name_models(args.models)
        args.port = find_port(args.host, args.port)
    run(args, models)


if __name__ == "__main__":
    main(make_parser().parse_args())
