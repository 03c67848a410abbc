# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare a step exported to ONNX, run by ONNX Runtime on the CPU, with eager and compiled PyTorch: time of one-step generation, size of
the files, and share of equal tokens.

    python benchmarks/export.py                     # the model in this repository, and larger ones with random weights
    python benchmarks/export.py --models outputs/quickstart/flm outputs/quickstart/fmlm --batch_sizes  # equal tokens only

Contenders take turns in one process, with the same number of threads. A call is one `generate()`, or its equivalent with the exported
step: draw noise, run the step, return the tokens. Equal tokens are reported for trained models only, because with random weights all
tokens are about equally likely.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import CompileConfig, set_seed

from modeling_flm import FMLMConfig, FMLMModel
from modeling_flm.base_flm import FLMPreTrainedModel
from modeling_flm.hub.export import FlowStep, compare, export_onnx, load, write_tokens
from modeling_flm.hub.records import ONNX_FILES, ONNX_FOLDER


# Width, number of blocks, vocabulary size, length
SIZES = {"small": (256, 6, 8192, 128), "medium": (512, 8, 32768, 128)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["examples/models/words_fmlm", *SIZES],
        help=f"folders of models, or {', '.join(SIZES)} for models with random weights",
    )
    parser.add_argument(
        "--batch_sizes", type=int, nargs="*", default=[1, 32], help="batch sizes to time; no value skips timing"
    )
    parser.add_argument("--precisions", nargs="+", choices=[*ONNX_FILES], default=[*ONNX_FILES])
    parser.add_argument(
        "--num_steps", type=int, nargs="+", default=[1, 4, 16], help="numbers of steps at which tokens are compared"
    )
    parser.add_argument("--repeats", type=int, default=20, help="number of calls of each contender")
    parser.add_argument("--no_compile", action="store_true", help="skip compiled PyTorch, which takes minutes")
    return parser


def build(name: str) -> FLMPreTrainedModel:
    """Loads a model from a folder, or builds one of the sizes with random weights."""
    if name not in SIZES:
        return load(name)
    hidden_size, num_hidden_layers, vocab_size, length = SIZES[name]
    set_seed(0)
    model = FMLMModel(
        FMLMConfig(
            vocab_size=vocab_size,
            max_position_embeddings=length,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=hidden_size // 64,
            attn_logit_softcapping=None,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    for layer in model.layers:
        torch.nn.init.normal_(layer.modulation.weight, std=0.02)
    return model


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def take_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Smallest, median and largest time of a call of each contender, in milliseconds, without the first two calls."""
    times = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: (min(each), statistics.median(each), max(each)) for name, each in times.items()}


def measure(name: str, args: argparse.Namespace):
    model = build(name).eval()
    step = FlowStep(model)
    length = model.config.max_position_embeddings
    print(f"\n## {name}: {model.num_parameters():,} parameters, {model.config.vocab_size:,} tokens, length {length}\n")
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, folder, args.precisions, check=False)
        paths = {precision: Path(folder, ONNX_FOLDER, ONNX_FILES[precision]) for precision in args.precisions}
        sessions = {precision: open_session(path) for precision, path in paths.items()}
        is_trained = name not in SIZES
        print(
            "| precision | MB |"
            + "".join(f" equal tokens, {steps} step{'s' * (steps > 1)} |" for steps in args.num_steps) * is_trained
        )
        print("|---|---|" + "---|" * len(args.num_steps) * is_trained)
        for precision, session in sessions.items():
            row = f"| {precision} | {paths[precision].stat().st_size / 1e6:.1f} |"
            for num_steps in args.num_steps if is_trained else []:
                row += f" {compare(session, step, num_steps, num_samples=64):.2%} |"
            print(row, flush=True)
        if args.batch_sizes:
            print(
                "\n| batch size | runtime | ms: median (min to max) | relative to compiled PyTorch |\n|---|---|---|---|"
            )
        for batch_size in args.batch_sizes:
            show_times(batch_size, model, step, sessions, args)


def show_times(
    batch_size: int,
    model: FLMPreTrainedModel,
    step: FlowStep,
    sessions: dict[str, onnxruntime.InferenceSession],
    args: argparse.Namespace,
):
    shape = (batch_size, model.config.max_position_embeddings, step.noise_size)
    options = {"num_samples": batch_size, "num_steps": 1, "batch_size": batch_size}
    generator = np.random.default_rng(0)
    contenders = {"PyTorch, eager": lambda: model.generate(**options)}
    if not args.no_compile:
        contenders["PyTorch, compiled"] = lambda: model.generate(**options, compile_config=CompileConfig(mode=None))
    for precision, session in sessions.items():
        contenders[f"ONNX Runtime, {precision}"] = lambda session=session: write_tokens(
            session, generator.standard_normal(shape, dtype=np.float32)
        )
    times = take_turns(contenders, args.repeats)
    reference = times.get("PyTorch, compiled", times["PyTorch, eager"])[1]
    for name, (least, median, most) in times.items():
        print(
            f"| {batch_size} | {name} | {median:.1f} ({least:.1f} to {most:.1f}) | {median / reference:.2f} |",
            flush=True,
        )


def main(args: argparse.Namespace):
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    for name in args.models:
        measure(name, args)


if __name__ == "__main__":
    main(make_parser().parse_args())
