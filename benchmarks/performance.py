# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare the time and memory of the library with a dense implementation, and with transformers' GPT-2 of the same size.

    python benchmarks/performance.py train --vocab_sizes 50258 --lengths 128 --hidden_sizes 768 --batch_sizes 32
    python benchmarks/performance.py generate gpt2 --vocab_sizes 50258 --lengths 1024 --num_steps 1 8
    python benchmarks/performance.py sample --lengths 1024 --batch_sizes 1 8 32 --num_steps 1 32 --attn_implementations eager
    python benchmarks/performance.py growth --vocab_sizes 1000 50258 --batch_sizes 64
    python benchmarks/performance.py train distill generate gpt2 head batch --dtype bfloat16 --compile  # on a GPU

Suites:
    train     an optimizer step of an FLM
    distill   an optimizer step of each preset
    generate  sampling, compared with the dense implementation
    sample    sampling with the library alone
    gpt2      training and sampling, compared with GPT-2
    head      implementations of the head's cross-entropy
    growth    optimizer steps with different vocabularies
    noise     the cost of the noise in a step, which does not depend on the batch, compared with an embedding times a square matrix
    batch     the largest batch that fits in `--memory` GiB

Contenders take turns in one process. Memory is the peak of a call beyond the memory in use before it, such as weights and optimizer
states. On the CPU, measuring memory needs Linux. Prints tables and saves all measurements to `--output` as JSON.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import dense
import measure
import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from modeling_flm import FLMConfig, FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.hub.records import to_json
from modeling_flm.joint_noise import JointNoise
from modeling_flm.losses import linear_loss, softmax_cross_entropy
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, FMLMTrainingArguments


GIB = 2**30
SUITES = ("train", "distill", "generate", "sample", "gpt2", "head", "growth", "noise", "batch")
AXES = ("vocab_size", "length", "hidden_size", "attention", "batch_size")
PRESETS = ("single_stage", "self_distillation", "two_network", "second_stage")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "suites", nargs="+", choices=SUITES, metavar="SUITE", help=f"one or more of {', '.join(SUITES)}"
    )
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[50258])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--hidden_sizes", type=int, nargs="+", default=[768])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 8], help="numbers of sampling steps")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS, help="distillation presets")
    parser.add_argument(
        "--attn_implementations",
        nargs="+",
        default=["sdpa"],
        help="attention implementations; all but sdpa apply a softcap of 50",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of autocast")
    parser.add_argument("--compile", action="store_true", help="compile all contenders")
    parser.add_argument("--memory", type=float, default=4.0, help="memory for the suite `batch`, in GiB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/performance.json"))
    return parser


class Benchmark:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.ceilings = measure.Ceilings(self.device)
        self.records = []

    # Models and steps

    def build(self, vocab_size: int, length: int, hidden_size: int, attention: str) -> FLMModel:
        config = FLMConfig(
            vocab_size=vocab_size,
            max_position_embeddings=length,
            hidden_size=hidden_size,
            num_hidden_layers=self.args.num_hidden_layers,
            num_attention_heads=hidden_size // 64,
            attn_logit_softcapping=None if attention == "sdpa" else 50.0,
            attn_implementation=attention,
        )
        model = FLMModel(config)
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
        return model.to(self.device)

    def build_gpt2(self, vocab_size: int, length: int, hidden_size: int) -> GPT2LMHeadModel:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=length,
            n_embd=hidden_size,
            n_layer=self.args.num_hidden_layers,
            n_head=hidden_size // 64,
            bos_token_id=0,
            eos_token_id=None,
        )
        return GPT2LMHeadModel(config).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16")

    def maybe_compile(self, function: Callable) -> Callable:
        return torch.compile(function) if self.args.compile else function

    def optimizer_step(self, model: PreTrainedModel, backward: Callable[[], None]) -> Callable[[], None]:
        """A step of AdamW on the gradients of `backward`."""
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

        def step():
            backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def training_step(self, model: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        """An optimizer step on a loss function."""
        loss = self.maybe_compile(loss)

        def backward():
            with self.autocast():
                value = loss()
            value.backward()

        return self.optimizer_step(model, backward)

    def trainer_step(self, trainer: FLMTrainer, input_ids: torch.Tensor) -> Callable[[], None]:
        """A step as the trainer takes it."""
        model = trainer.accelerator.prepare_model(trainer.model)

        def backward():
            examples = {"input_ids": input_ids, "labels": input_ids}
            (batch,), num_items = trainer.get_batch_samples(iter([examples]), 1, self.device)
            trainer.training_step(model, batch, num_items)
            trainer.state.global_step += 1  # so that the next step has other times and noise

        return self.optimizer_step(model, backward)

    def trainer_arguments(self, folder: str, batch_size: int) -> dict:
        return {
            "per_device_train_batch_size": batch_size,
            "output_dir": folder,
            "report_to": [],
            "bf16": self.args.dtype == "bfloat16",
            "torch_compile": self.args.compile,
            "use_cpu": self.device.type == "cpu",
            "ema_decay": None,
        }

    @contextmanager
    def flm_steps(self, vocab_size, length, hidden_size, batch_size, attention) -> Iterator[dict[str, Callable]]:
        """An optimizer step of an FLM with the library, and with the dense implementation."""
        model = self.build(vocab_size, length, hidden_size, attention)
        reference = copy.deepcopy(model).train()
        input_ids = torch.randint(vocab_size, (batch_size, length), device=self.device)
        with tempfile.TemporaryDirectory() as folder:
            trainer = FLMTrainer(model, FLMTrainingArguments(**self.trainer_arguments(folder, batch_size)))
            yield {
                "library": self.trainer_step(trainer, input_ids),
                "dense": self.training_step(
                    reference,
                    lambda: dense.flm_loss(reference, input_ids, torch.rand(batch_size, device=self.device)),
                ),
            }

    @contextmanager
    def distillation_steps(self, preset, vocab_size, length, hidden_size, batch_size, attention):
        """An optimizer step of a flow map with the library, and with the dense implementation."""
        flm = self.build(vocab_size, length, hidden_size, attention)
        teacher = None if preset in ("self_distillation", "two_network") else flm.eval()
        model = (FMLMTwoNetworkModel if preset == "two_network" else FMLMModel).from_flm(flm)
        if preset == "second_stage":
            teacher = FMLMTwoNetworkModel.from_flm(flm).eval()
        reference = copy.deepcopy(model).train()
        input_ids = torch.randint(vocab_size, (batch_size, length), device=self.device)

        def loss():
            first, second = torch.rand(2, batch_size, device=self.device) * 0.998
            times = torch.minimum(first, second), torch.maximum(first, second) + 1e-3
            return dense.distillation_loss(preset, reference, teacher, input_ids, *times)

        with tempfile.TemporaryDirectory() as folder:
            args = FMLMTrainingArguments.from_preset(preset, **self.trainer_arguments(folder, batch_size))
            trainer = FMLMTrainer(model, args, teacher=teacher)
            yield {
                "library": self.trainer_step(trainer, input_ids),
                "dense": self.training_step(reference, loss),
            }

    # Measurements

    def record(
        self, suite: str, settings: dict, functions: dict[str, Callable], num_tokens: int | None, count: str | None
    ):
        """
        Measures functions that process `num_tokens` tokens each. The function named `count` is also compared with the
        machine's ceilings, by counting the operations of an uncompiled call.
        """
        measure.seconds(functions, 1, self.device)  # warms up
        peaks = {name: measure.peak_memory(function, self.device) for name, function in functions.items()}
        times = measure.seconds(functions, self.args.repeats, self.device)
        for name in functions:
            row = {
                "suite": suite,
                "contender": name,
                **settings,
                "seconds": times[name],
                "tokens_per_second": num_tokens and num_tokens / times[name],
                "peak_gib": peaks[name] / GIB,
            }
            if name == count:
                with torch.compiler.set_stance("force_eager"), measure.Cost(self.ceilings) as cost:
                    functions[name]()
                row |= {
                    "tflop": sum(cost.flops.values()) / 1e12,
                    "gb_moved": cost.bytes / 1e9,
                    "of_matrix_ceiling": cost.compute_limit / times[name],
                    "of_roofline": cost.limit / times[name],
                }
            self.records.append(row)

    def grid(self, batch_sizes: bool = True) -> list[dict]:
        args = self.args
        names = AXES if batch_sizes else AXES[:-1]
        axes = (args.vocab_sizes, args.lengths, args.hidden_sizes, args.attn_implementations, args.batch_sizes)
        return [dict(zip(names, values)) for values in itertools.product(*axes[: len(names)])]

    def run(self, suite: str):
        has_batch = suite != "batch"
        for settings in tqdm(self.grid(has_batch), desc=suite):
            torch.compiler.reset()
            getattr(self, suite)(**settings)

    def train(self, **settings):
        with self.flm_steps(**settings) as functions:
            num_tokens = settings["batch_size"] * settings["length"]
            self.record("train", settings, functions, num_tokens, "library")

    def distill(self, **settings):
        for preset in self.args.presets:
            with self.distillation_steps(preset, **settings) as functions:
                num_tokens = settings["batch_size"] * settings["length"]
                self.record("distill", {"preset": preset, **settings}, functions, num_tokens, None)

    def generate(self, vocab_size, length, hidden_size, attention, batch_size):
        model = self.build(vocab_size, length, hidden_size, attention).eval()
        compile_config = CompileConfig(mode=None) if self.args.compile else None  # the same backend as `torch.compile`
        state = torch.randn(batch_size, length, hidden_size, device=self.device)
        tau = torch.full((batch_size,), 0.5, device=self.device)
        encode = self.maybe_compile(model.encode)
        delta = self.maybe_compile(dense.delta)

        @torch.no_grad()
        def forward():
            """Runs the backbone and the head, one chunk of logits at a time."""
            hidden_states = encode(state, tau)
            for chunk in model.chunks(state):
                model.logits(hidden_states[:, chunk])

        @torch.no_grad()
        def blocks():
            encode(state, tau)

        def library(num_steps: int):
            options = {"batch_size": batch_size, "length": length, "gamma": 0.0, "compile_config": compile_config}
            return model.generate(num_samples=batch_size, num_steps=num_steps, **options)

        settings = dict(zip(AXES, (vocab_size, length, hidden_size, attention, batch_size)))
        for num_steps in self.args.num_steps:
            functions = {
                "library": partial(library, num_steps),
                "dense": partial(dense.generate, model, batch_size, length, num_steps, delta),
                "forward pass": forward,
                "blocks of it": blocks,
            }
            with self.autocast():
                settings = {**settings, "num_steps": num_steps}
                self.record("generate", settings, functions, batch_size * length, "library")

    def sample(self, vocab_size, length, hidden_size, attention, batch_size):
        """Measures `generate` of a flow map once per setting, because many steps of large batches are slow on a CPU."""
        model = FMLMModel.from_flm(self.build(vocab_size, length, hidden_size, attention)).eval()
        model.generate(num_samples=1, num_steps=1)  # creates what later calls reuse
        for num_steps in self.args.num_steps:
            seconds = 0.0

            def generate(num_steps: int = num_steps):
                nonlocal seconds
                start = time.perf_counter()
                model.generate(num_samples=batch_size, batch_size=batch_size, num_steps=num_steps, gamma=0.0)
                measure.synchronize(self.device)
                seconds = time.perf_counter() - start

            with self.autocast():
                peak = measure.peak_memory(generate, self.device)
            settings = dict(zip(AXES, (vocab_size, length, hidden_size, attention, batch_size)))
            row = {"suite": "sample", "contender": "library", **settings, "num_steps": num_steps, "seconds": seconds}
            row |= {"tokens_per_second": batch_size * length / seconds, "peak_gib": peak / GIB}
            self.records.append(row | {"weights_gib": 4 * model.num_parameters() / GIB})

    def gpt2(self, vocab_size, length, hidden_size, attention, batch_size):
        sizes = (vocab_size, length, hidden_size)
        settings = dict(zip(AXES, (vocab_size, length, hidden_size, attention, batch_size)))
        gpt2 = self.build_gpt2(*sizes)
        input_ids = torch.randint(vocab_size, (batch_size, length), device=self.device)
        with self.flm_steps(**settings) as functions:
            step = self.training_step(gpt2.train(), lambda: gpt2(input_ids, labels=input_ids).loss)
            functions = {"FLM": functions["library"], "GPT-2": step}
            self.record("gpt2: training step", settings, functions, batch_size * length, None)
        del functions, step
        gpt2, model = gpt2.eval(), self.build(*sizes, attention).eval()
        prompt = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        options = {"cache_implementation": "static"} if self.args.compile else {}

        def autoregressive():
            return gpt2.generate(prompt, max_new_tokens=length - 1, do_sample=True, pad_token_id=0, **options)

        def one_step(num_samples: int):
            compile_config = CompileConfig(mode=None) if self.args.compile else None
            return model.generate(num_samples=num_samples, num_steps=1, length=length, compile_config=compile_config)

        with self.autocast():
            functions = {"one-step flow map": partial(one_step, 1), "GPT-2 with KV cache": autoregressive}
            self.record("gpt2: one sample", {**settings, "batch_size": 1}, functions, length, None)
            functions = {"one-step flow map": partial(one_step, batch_size)}
            self.record("gpt2: a batch of samples", settings, functions, batch_size * length, None)

    def head(self, vocab_size, length, hidden_size, attention, batch_size):
        hidden_states = torch.randn(batch_size, length, hidden_size, device=self.device, requires_grad=True)
        head = torch.nn.Linear(hidden_size, vocab_size, device=self.device)
        weight, bias = head.weight, head.bias
        labels = torch.randint(vocab_size, (batch_size, length), device=self.device)
        ones = torch.ones(batch_size, length, device=self.device)
        flat, flat_labels = hidden_states.flatten(0, 1), labels.flatten()

        def library(softcap: float | None):
            def function(outputs, chunk, workspace):
                return softmax_cross_entropy(outputs, labels[:, chunk], softcap, workspace)

            return linear_loss(function, ones, hidden_states, weight, bias)[0] / labels.numel()

        losses = {
            "library": partial(library, None),
            "library, capped logits": partial(library, FLMConfig().final_logit_softcapping),
            "all logits": lambda: F.cross_entropy(F.linear(flat, weight, bias).float(), flat_labels),
        }
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            options = torch.nn.LinearCrossEntropyOptions()
            losses["torch, chunked"] = partial(
                F.linear_cross_entropy, flat, weight, flat_labels, linear_bias=bias, options=options
            )
        if self.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            losses["Liger"] = partial(liger_fused_linear_cross_entropy, flat, weight, flat_labels, bias)

        def run(name: str) -> float:
            with self.autocast():
                loss = losses[name]()
            torch.autograd.grad(loss, (hidden_states, weight, bias))
            return loss.item()

        gradient = torch.randn(len(flat), vocab_size, device=self.device)

        @torch.no_grad()
        def products():
            """The matrix products that every implementation needs."""
            with self.autocast():
                return flat @ weight.T, gradient @ weight, gradient.T @ flat

        expected = run("all logits")  # the logits are small, so the cap hardly changes the loss
        for name in losses:
            if abs(run(name) - expected) > 1e-2 * expected:
                raise RuntimeError(f"{name} gives a loss of {run(name)} instead of {expected}.")
        settings = {"vocab_size": vocab_size, "length": length, "hidden_size": hidden_size, "batch_size": batch_size}
        functions = {name: partial(run, name) for name in losses} | {"its products alone": products}
        self.record("head", settings, functions, batch_size * length, None)

    def growth(self, vocab_size, length, hidden_size, attention, batch_size):
        if vocab_size != self.args.vocab_sizes[0]:
            return  # one call measures all vocabularies
        sizes = (length, hidden_size, batch_size, attention)
        with ExitStack() as stack:
            steps = {
                f"V = {size}": stack.enter_context(self.flm_steps(size, *sizes))["library"]
                for size in self.args.vocab_sizes
            }
            gc.collect()  # frees the dense models
            hidden_states = torch.randn(batch_size * length, hidden_size, device=self.device)

            def products(weight: torch.Tensor, gradient: torch.Tensor):
                with self.autocast():
                    return hidden_states @ weight.T, gradient @ weight, gradient.T @ hidden_states

            for size in self.args.vocab_sizes:
                tensors = torch.randn(size, hidden_size), torch.randn(len(hidden_states), size)
                steps[f"products of the head, V = {size}"] = partial(products, *(x.to(self.device) for x in tensors))
            settings = {"length": length, "hidden_size": hidden_size, "attention": attention, "batch_size": batch_size}
            self.record("growth", settings, steps, batch_size * length, None)

    def noise(self, vocab_size, length, hidden_size, attention, batch_size):
        teacher = 0.02 * torch.randn(vocab_size, hidden_size, device=self.device)
        student = (teacher + 1e-4 * torch.randn_like(teacher)).requires_grad_()
        square = torch.randn(hidden_size, hidden_size, device=self.device)
        frozen_gram = JointNoise(student, teacher, frozen=(1,)).frozen_gram
        no_tokens = torch.zeros(0, dtype=torch.long, device=self.device)
        noises = {
            "one network": partial(JointNoise, student),
            "student and teacher": partial(JointNoise, student, teacher, frozen=(1,), frozen_gram=frozen_gram),
        }

        def backward(noise: JointNoise):
            factor, _ = noise.factor_and_tokens(0, student, no_tokens)
            torch.autograd.grad(factor, student, torch.ones_like(factor))

        functions = {"plain product": lambda: teacher @ square}
        for name, make in noises.items():
            functions |= {f"{name}, made": make, f"{name}, backward": partial(backward, make())}
        settings = {"vocab_size": vocab_size, "hidden_size": hidden_size}
        self.record("noise", settings, functions, None, None)

    def batch(self, **settings):
        def fits(name: str, batch_size: int) -> bool:
            with self.flm_steps(**settings, batch_size=batch_size) as functions:
                try:
                    functions[name]()  # creates the optimizer states
                    return measure.peak_memory(functions[name], self.device) <= self.args.memory * GIB
                except torch.OutOfMemoryError:
                    return False
                finally:
                    gc.collect()

        for name in ("library", "dense"):
            fitting, failing = 0, 1
            while fits(name, failing):
                fitting, failing = failing, 2 * failing
            while failing - fitting > max(1, fitting // 8):  # with a precision of 1/8
                middle = (fitting + failing) // 2
                fitting, failing = (middle, failing) if fits(name, middle) else (fitting, middle)
            row = {"suite": "batch", "contender": name, **settings, "memory_gib": self.args.memory}
            self.records.append(row | {"largest_batch_size": fitting})

    # Output

    def machine(self) -> str:
        name = platform.processor() or platform.machine()
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif Path("/proc/cpuinfo").is_file():
            models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
            name = models[0].split(":")[1].strip() if models else name
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        options = f"{self.args.dtype}{', compiled' if self.args.compile else ''}"
        return f"{name}{threads}; {options}; torch {torch.__version__}, transformers {transformers.__version__}"

    def show(self):
        print(f"\n{self.machine()}; {self.ceilings}")
        for suite, rows in itertools.groupby(self.records, key=lambda row: row["suite"]):
            rows = list(rows)
            names = list(dict.fromkeys(name for row in rows for name in row if name != "suite"))
            print(f"\n{suite}\n| " + " | ".join(names) + " | times the first |")
            print("|---" * (len(names) + 1) + "|")
            first = {}
            for row in rows:
                key = tuple(row.get(name) for name in (*AXES, "num_steps", "preset"))
                first.setdefault(key, row)
                measured = "seconds" if "seconds" in row else "largest_batch_size"
                ratio = f"{row[measured] / first[key][measured]:.2f}" if first[key][measured] else "-"
                print("| " + " | ".join([self.format(row.get(name)) for name in names] + [ratio]) + " |")

    @staticmethod
    def format(value) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    def save(self):
        self.args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": " ".join(sys.argv), "machine": self.machine(), "ceilings": str(self.ceilings)}
        self.args.output.write_text(to_json(result | {"records": self.records}, indent=2) + "\n")


def main(args: argparse.Namespace):
    set_seed(0)
    # A student that starts as its teacher has tiny gradients, whose denormal squares are slow on a CPU.
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    benchmark = Benchmark(args)
    for suite in args.suites:
        benchmark.run(suite)
        benchmark.save()
    benchmark.show()


if __name__ == "__main__":
    main(make_parser().parse_args())
