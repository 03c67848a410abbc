# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Load test of `examples/serving/serve.py` on this machine, with a flow map and a GPT-2 with KV cache: throughput, response times and
batch sizes.

    python benchmarks/serving.py
    python benchmarks/serving.py --hidden_size 768 --num_hidden_layers 12 --vocab_size 50258 --length 1024 --max_batch_size 64
    python benchmarks/serving.py --concurrency 1 8 --num_steps 1 4 --seconds 20

Each of `--concurrency` clients sends a request for one sample, and the next one as soon as it is answered. Clients run on the same
machine and take part of its time. Weights are random and all samples have `--length` tokens. Both models have the same width and number
of blocks; a block of the flow map has more parameters, for its conditioning on time.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase


SERVER = Path(__file__).resolve().parents[1] / "examples" / "serving"
sys.path.insert(0, str(SERVER))
from serve import bounded  # noqa: E402

from modeling_flm import FLMConfig, FLMModel, FMLMModel  # noqa: E402
from modeling_flm.trainers import train_tokenizer  # noqa: E402


SCRIPT = SERVER / "serve.py"
QUICK = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "length": 8,
    "concurrency": [1, 4],
    "seconds": 0.5,
}


class Server:
    """
    Server in processes of its own, on a free port of this machine.

    Args:
        arguments (`list`): Models and flags for `examples/serving/serve.py`.

    Raises:
        `RuntimeError`: if the server does not start.
    """

    def __init__(self, arguments: list):
        command = [sys.executable, str(SCRIPT), *map(str, arguments), "--port", "0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.errors = tempfile.TemporaryFile("w+")
        pipes = {"stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        try:
            self.line = self.process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", self.line)
            if address is None:
                self.errors.seek(0)
                raise RuntimeError(f"The server did not start: {self.line}{self.errors.read()}")
            self.port = int(address[1])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stops the server, even if it has not started. Raises `subprocess.TimeoutExpired` if it had to be killed."""
        try:
            self.process.terminate()
            self.process.wait(timeout=60)
        finally:
            self.process.kill()  # no effect if the server has stopped
            self.process.wait()
            self.process.stdout.close()
            self.errors.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def send(self, method: str, path: str, body: bytes | str | None = None) -> tuple[int, str, dict[str, str]]:
        """Sends a request. Returns the status, the body and the headers of the response."""
        connection = self.connect()
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read().decode(), dict(response.headers)
        finally:
            connection.close()

    def metric(self, name: str, labels: str) -> float:
        """Returns a value from `/metrics`, or 0 if it is missing. `labels` is a regular expression."""
        found = re.search(rf"^flm_{name}{{{labels}}} (\S+)$", self.send("GET", "/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0


def build_models(args: argparse.Namespace) -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    """Builds a flow map and a GPT-2 with random weights, and a tokenizer for both."""
    heads = max(1, args.hidden_size // 64)
    config = FLMConfig(
        vocab_size=args.vocab_size,
        max_position_embeddings=args.length,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=heads,
    )
    flow_map = FMLMModel.from_flm(FLMModel(config))
    torch.nn.init.normal_(flow_map.lm_head.weight, std=0.02)  # zero by default
    gpt2_config = GPT2Config(
        vocab_size=args.vocab_size,
        n_positions=args.length + 1,  # with the BOS token
        n_embd=args.hidden_size,
        n_layer=args.num_hidden_layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,  # as in flow-based models
    )
    words = " ".join(f"w{number}" for number in range(args.vocab_size))
    tokenizer = train_tokenizer([words], "word", args.vocab_size)
    tokenizer.eos_token = None
    return {"fmlm": flow_map, "gpt2": GPT2LMHeadModel(gpt2_config)}, tokenizer


def load(server: Server, fields: dict, concurrency: int, seconds: float) -> dict[str, float]:
    """
    Measures the server under the load of concurrent clients, each of which sends one request after the other.

    Args:
        server (`Server`): The server.
        fields (`dict`): Fields of the requests, except for the seed.
        concurrency (`int`): Number of clients.
        seconds (`float`): Duration during which clients send new requests.

    Returns:
        `dict[str, float]`: Measurements by the name of their column.
    """
    labels = f'model="{fields["model"]}"'

    def client(index: int) -> list[tuple[float, int]]:
        answered, connection = [], server.connect()
        while time.perf_counter() < end or not answered:
            body = json.dumps({**fields, "seed": index + concurrency * len(answered)})
            sent = time.perf_counter()
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200:
                raise RuntimeError(f"A request failed with status {response.status}: {answer['error']['message']}")
            answered.append((time.perf_counter() - sent, answer["usage"]["completion_tokens"]))
        connection.close()
        return answered

    before = [server.metric(f"batch_size_{name}", labels) for name in ("sum", "count")]
    start = time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(concurrency) as pool:
        answered = [row for rows in pool.map(client, range(concurrency)) for row in rows]
    elapsed = time.perf_counter() - start  # until the last response
    after = [server.metric(f"batch_size_{name}", labels) for name in ("sum", "count")]
    latencies, tokens = zip(*answered)
    return {
        "samples/s": len(answered) / elapsed,
        "tokens/s": sum(tokens) / elapsed,
        "p50 ms": 1000 * np.percentile(latencies, 50),
        "p95 ms": 1000 * np.percentile(latencies, 95),
        "batch size": (after[0] - before[0]) / (after[1] - before[1]),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=bounded(1), default=256)
    parser.add_argument("--num_hidden_layers", type=bounded(1), default=4)
    parser.add_argument("--vocab_size", type=bounded(1), default=8192)
    parser.add_argument("--length", type=bounded(1), default=64, help="length of the samples")
    parser.add_argument("--num_steps", type=bounded(1), nargs="+", default=[1], help="steps of the flow map")
    parser.add_argument("--concurrency", type=bounded(1), nargs="+", default=[1, 4, 16, 64], help="numbers of clients")
    parser.add_argument("--seconds", type=bounded(0.1, float), default=5.0, help="duration of each measurement")
    parser.add_argument("--replicas", type=bounded(1), default=1, help="processes for each model")
    parser.add_argument("--max_batch_size", type=bounded(1), default=32)
    parser.add_argument("--max_wait_ms", type=bounded(0, float), default=5.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="short test with tiny models")
    return parser


def main(args: argparse.Namespace):
    if args.quick:
        vars(args).update(QUICK)
    models, tokenizer = build_models(args)
    sizes = ", ".join(f"{name} {model.num_parameters() / 1e6:.1f} M" for name, model in models.items())
    contenders = {
        f"FMLM, {steps} step{'s' * (steps > 1)}": {"model": "fmlm", "num_steps": steps} for steps in args.num_steps
    }
    contenders["GPT-2 with KV cache"] = {"model": "gpt2", "max_tokens": args.length}
    flags = ["--device", args.device, "--replicas", args.replicas, "--max_batch_size", args.max_batch_size]
    flags += ["--max_wait_ms", args.max_wait_ms, "--max_queue", max(args.concurrency), "--timeout", 600]
    flags += ["--max_num_steps", max(args.num_steps)]
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(Path(folder, name))
            tokenizer.save_pretrained(Path(folder, name))
        with Server([Path(folder, name) for name in models] + flags) as server:
            print(f"{os.cpu_count()} CPU cores, {args.device}; {sizes} parameters; samples of {args.length} tokens\n")
            for fields in contenders.values():  # warms up
                load(server, fields, max(args.concurrency), 0)
            names = None
            for concurrency in args.concurrency:
                for name, fields in contenders.items():
                    row = load(server, fields, concurrency, args.seconds)
                    if names is None:
                        names = ["clients", "model", *row]
                        print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
                    values = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in row.values()]
                    print(f"| {concurrency} | {name} | " + " | ".join(values) + " |", flush=True)


if __name__ == "__main__":
    main(make_parser().parse_args())
