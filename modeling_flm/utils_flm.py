# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Helpers that several files share: chunks, tracing, evaluation mode, progress bars, files, numbers, and a limit of `torch.compile`."""

import functools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


# Maximum number of probabilities in a chunk: 330 tokens at V = 50k on a CPU, so that they stay in the caches, and 1300 on a
# GPU, which needs larger matrices to be busy. See docs/performance.md; the value for GPUs is not measured.
CHUNK_ELEMENTS = {"cpu": 2**24, "default": 2**26}


def chunks(batch_size: int, length: int, vocab_size: int, device: torch.device) -> list[slice]:
    """
    Splits the positions of a batch into chunks whose probabilities over the vocabulary fit into memory.

    Args:
        batch_size (`int`): The number of sequences.
        length (`int`): The number of positions of a sequence.
        vocab_size (`int`): The size of the vocabulary.
        device (`torch.device`): The device of the probabilities.

    Returns:
        `list[slice]`: Consecutive slices of the position axis; each applies to the whole batch. A single one while a program
        is exported or traced, because their number would fix its sizes.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return [slice(0, length)]
    budget = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["default"])
    size = max(1, budget // (batch_size * vocab_size))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def is_traced() -> bool:
    """Whether operations are recorded (compiled, exported or traced) instead of run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def has_values(tensor: torch.Tensor) -> bool:
    """Whether code may depend on the values of a tensor: not while tracing, on the meta device or in a `FakeTensorMode`."""
    return not (is_traced() or tensor.is_meta or type(tensor) is not torch.Tensor)


def may_overwrite(layer: nn.Module) -> bool:
    """
    Whether later code may change the output of a layer in place, to save memory: without gradients, and if no forward hook
    keeps it.
    """
    if torch.is_grad_enabled() or is_traced():
        return False
    parts = layer.modules() if layer._modules else (layer,)  # walking is slow for a call in every block
    return not (torch.nn.modules.module._global_forward_hooks or any(part._forward_hooks for part in parts))


# For modules in evaluation mode for now: the number of contexts, of all threads, and the mode to restore after the last one
_EVALUATING: Counter[nn.Module] = Counter()
_MODES: dict[nn.Module, bool] = {}
_LOCK = threading.Lock()


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """
    Puts networks into evaluation mode within this context, and restores the mode of every module afterwards. Contexts may
    overlap, in several threads as well.
    """
    modules = {module for network in networks for module in network.modules()}
    with _LOCK:
        _EVALUATING.update(modules)
        for module in modules:
            _MODES.setdefault(module, module.training)
        for network in networks:
            network.eval()
    try:
        yield
    finally:
        with _LOCK:
            _EVALUATING.subtract(modules)
            for module in modules:
                if _EVALUATING[module] == 0:
                    module.training = _MODES.pop(module)
                    del _EVALUATING[module]


def in_evaluation_mode(method: Callable) -> Callable:
    """Decorates a method of a model, which then runs in evaluation mode, along with all networks among its arguments."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with evaluating(self, *(value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))):
            return method(self, *args, **kwargs)

    return run


class CompiledFunction:
    """A compiled function, with options of `torch.compile`. It is pickled without what was compiled."""

    def __init__(self, function: Callable, options: dict):
        self.function, self.options = function, options
        self.compiled = torch.compile(function, **options)

    def __call__(self, *args, **kwargs):
        return self.compiled(*args, **kwargs)

    def __reduce__(self):
        return type(self), (self.function, self.options)

    def __deepcopy__(self, memo):
        return self


def raise_recompile_limit():
    """Allows `torch.compile` more graphs of a function, for several networks, shapes and modes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


# Types of weights that may be NaN
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Seconds before a progress bar appears. Most batches are finished by then.
PROGRESS_DELAY = 2


def progress(number: int, unit: str) -> Iterable[int]:
    """Iterates over the steps or rounds of a batch, with a progress bar if they take long."""
    options = {"desc": f"{unit.capitalize()}s", "unit": unit, "delay": PROGRESS_DELAY, "leave": None}
    return range(number) if number == 1 else logging.tqdm(range(number), **options)


def describe_other_content(path: str | Path) -> str | None:
    """Returns what a file has instead of its content, and what to do, or `None`: a pointer, a web page, or nothing."""
    with Path(path).open("rb") as file:
        start = file.read(100)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS, without the content: run `git lfs pull` in its folder."
    if not start or start.lstrip().startswith(b"<"):
        return f"{path} is {'a web page' if start else 'empty'}: download or copy the file again."
    return None


def describe_damage(path: str | Path) -> str | None:
    """Returns what is wrong with a safetensors or JSON file, and what to do, or `None` if it can be read."""
    path = Path(path)
    if (other := describe_other_content(path)) is not None:
        return other
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return f"{path} is truncated or damaged: download or copy the file again."
    return None


def check_finite(name: str, network: PreTrainedModel):
    """Raises a `ValueError` if weights of a network are NaN or infinite. Sharded and quantized weights are left out."""
    for key, parameter in network.named_parameters():
        weight = parameter.detach()
        if type(weight) is not torch.Tensor or weight.is_meta or weight.dtype not in _FLOATS:
            continue
        if not torch.isfinite(weight).all():
            place = network.name_or_path or type(network).__name__
            raise ValueError(
                f"{name} ({place}) has weights that are NaN or infinite, in {key}: pass one from before that, or train it again."
            )


def use_default_mode(folder: str | Path):
    """Gives the weights in a folder the mode of new files, as the umask decides. safetensors lets only their owner read them."""
    probe = Path(folder, ".mode")
    with suppress(OSError):  # some file systems have no modes
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for path in Path(folder).glob("*.safetensors"):
            if path.stat().st_mode & 0o777 == 0o600:
                path.chmod(mode)


def as_python(value: Any) -> Any:
    """Returns numbers and arrays of numpy as numbers and lists of Python, also within lists, tuples and dictionaries."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(as_python, value))
    return {key: as_python(each) for key, each in value.items()} if type(value) is dict else value
