# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Time, memory and roofline limits of functions."""

import ctypes
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


aten = torch.ops.aten


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(functions: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each function. Functions take turns, so that other load on the machine affects all of them."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _status(name: str) -> int:
    """A number of bytes from Linux's status of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}.")


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes, beyond the memory in use before it. Needs Linux on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


class Ceilings:
    """Speed of this machine: matrix products by dtype, and copies."""

    def __init__(self, device: torch.device, repeats: int = 3):
        size = 8192 if device.type == "cuda" else 2048
        dtypes = [torch.float32, torch.float64, torch.bfloat16]
        sizes = dict.fromkeys(dtypes, size)
        if device.type != "cuda":
            sizes[torch.bfloat16] = 256  # larger takes minutes on CPUs without bfloat16 instructions
        pairs = {dtype: torch.randn(2, size, size, device=device).to(dtype) for dtype, size in sizes.items()}
        source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
        target = torch.empty_like(source)
        functions = {str(dtype): lambda pair=pair: pair[0] @ pair[1] for dtype, pair in pairs.items()}
        functions["copy"] = lambda: target.copy_(source)
        seconds(functions, 1, device)  # warms up
        times = seconds(functions, repeats, device)
        self.flops = {dtype: 2 * size**3 / times[str(dtype)] for dtype, size in sizes.items()}
        self.bandwidth = 2 * source.nbytes / times["copy"]

    def __str__(self) -> str:
        products = ", ".join(f"{str(dtype)[6:]} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in self.flops.items())
        return f"matrix products: {products}; copies: {self.bandwidth / 1e9:,.0f} GB/s"


class Cost(TorchDispatchMode):
    """
    Counts the floating-point operations of matrix products, and the bytes that all operations read and write. `limit` is the
    sum over operations of the smallest possible time of each (the roofline).
    """

    free = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view)
    making = (aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full)
    overwriting = (aten.copy_, aten.zero_, aten.fill_, aten.normal_, aten.uniform_, aten.bernoulli_)
    looking_up = (aten.embedding, aten.gather, aten.index, aten.index_select)

    def __init__(self, ceilings: Ceilings):
        super().__init__()
        self.ceilings = ceilings
        self.flops = Counter()
        self.bytes = 0
        self.limit = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        packet = function._overloadpacket
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if function.is_view or packet in self.free:
            return output
        moved, written = 0, []
        for value, argument in zip((*args, *kwargs.values()), (*function._schema.arguments[: len(args)], *kwargs)):
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            is_written = (
                not isinstance(argument, str) and argument.alias_info is not None and argument.alias_info.is_write
            )
            if is_written:
                written += tensors
            if not (packet in self.overwriting and is_written) and packet not in self.making:
                moved += sum(tensor.nbytes for tensor in tensors)
        # A fused optimizer returns nothing and writes to its arguments.
        moved += sum(tensor.nbytes for tensor in written or outputs)
        if packet in self.looking_up:  # the rows, not the whole table
            moved = 2 * outputs[0].nbytes
        flops, dtype = 0, (outputs or written)[0].dtype if outputs or written else None
        if packet is aten.addmm_:  # missing from the registry
            flops = 2 * args[0].numel() * args[1].shape[-1]
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=output)
        self.flops[dtype] += flops
        self.bytes += moved
        compute = flops / self.ceilings.flops[dtype] if flops else 0.0
        self.limit += max(compute, moved / self.ceilings.bandwidth)
        return output

    @property
    def compute_limit(self) -> float:
        """Smallest possible time of the matrix products alone."""
        return sum(flops / self.ceilings.flops[dtype] for dtype, flops in self.flops.items() if flops)
