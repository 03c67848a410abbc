# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare quantization methods, each with its defaults, with the model in float32: share of equal tokens in samples from the same noise,
size of the weights, and time per sample.

    python benchmarks/quantization.py --model outputs/quickstart/fmlm

Prints the table of docs/adapters.md. Most kernels of bitsandbytes, torchao and torch are slow on a CPU, so times measured there do
not transfer to a GPU.
"""

import argparse
import io
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils import logging as transformers_logging

import modeling_flm  # noqa: F401, which registers the models


def _quantize_dynamic(model: str, device: str) -> PreTrainedModel:
    # Deprecated in favor of torchao, but still widely used
    return torch.ao.quantization.quantize_dynamic(AutoModel.from_pretrained(model), {nn.Linear})


def _with_bitsandbytes(dtype: torch.dtype = torch.float32, **options) -> Callable[[str, str], PreTrainedModel]:
    def load(model: str, device: str) -> PreTrainedModel:
        config = BitsAndBytesConfig(**options)
        return AutoModel.from_pretrained(model, dtype=dtype, device_map=device, quantization_config=config)

    return load


def _with_torchao(name: str) -> Callable[[str, str], PreTrainedModel]:
    def load(model: str, device: str) -> PreTrainedModel:
        import torchao.quantization

        config = TorchAoConfig(getattr(torchao.quantization, name)())
        return AutoModel.from_pretrained(model, device_map=device, quantization_config=config)

    return load


def _in_dtype(dtype: torch.dtype) -> Callable[[str, str], PreTrainedModel]:
    return lambda model, device: AutoModel.from_pretrained(model, dtype=dtype).to(device)


# Name in the table -> function that loads a model folder to a device
METHODS: dict[str, Callable[[str, str], PreTrainedModel]] = {
    "float32": _in_dtype(torch.float32),
    "bfloat16": _in_dtype(torch.bfloat16),
    "bitsandbytes, 8 bit": _with_bitsandbytes(load_in_8bit=True),
    "bitsandbytes, 4 bit (fp4)": _with_bitsandbytes(load_in_4bit=True),
    "bitsandbytes, 4 bit (nf4), bfloat16": _with_bitsandbytes(
        torch.bfloat16, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "torchao, `Int8WeightOnlyConfig`": _with_torchao("Int8WeightOnlyConfig"),
    "torchao, `Int8DynamicActivationInt8WeightConfig`": _with_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torch, `quantize_dynamic`": _quantize_dynamic,
}
ONLY_ON_CPU = ("torch, `quantize_dynamic`",)


@dataclass
class Row:
    """Result of a method."""

    name: str
    agreement: float
    """Share of tokens equal to those from the model in float32."""
    megabytes: float
    """Size of the saved weights."""
    milliseconds: float
    """Time per sample in a batch."""

    def __str__(self) -> str:
        return f"| {self.name} | {100 * self.agreement:.1f} % | {self.megabytes:.2f} | {self.milliseconds:.2f} |"


def size_of_weights(model: nn.Module) -> int:
    """Size of the saved weights in bytes, because every method packs them in its own way."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def measure(model: str, methods: list[str], num_samples: int, num_steps: int, device: str) -> list[Row]:
    """Returns a row for each method. All are compared with the first."""
    rows, expected = [], None
    for name in methods:
        loaded = METHODS[name](model, device)
        size = size_of_weights(loaded)
        options = {"num_samples": num_samples, "num_steps": num_steps}
        seconds = []
        for _ in range(3):  # some methods prepare their weights in the first call
            start = time.perf_counter()
            tokens = loaded.generate(generator=torch.Generator().manual_seed(0), **options).cpu()
            seconds.append(time.perf_counter() - start)
        expected = tokens if expected is None else expected
        agreement = (tokens == expected).float().mean().item()
        rows.append(Row(name, agreement, size / 1e6, 1000 * min(seconds) / num_samples))
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of the model, in float32")
    parser.add_argument(
        "--num_samples", type=int, default=256, help="number of samples to compare (default: %(default)s)"
    )
    parser.add_argument("--num_steps", type=int, default=1, help="number of steps (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> list[Row]:
    # Some methods warn at every layer that they cast their inputs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    methods = [name for name in METHODS if args.device == "cpu" or name not in ONLY_ON_CPU]
    rows = measure(args.model, methods, args.num_samples, args.num_steps, args.device)
    print("| method | equal tokens | MB | ms per sample |\n|---|---|---|---|")
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    main(make_parser().parse_args())
