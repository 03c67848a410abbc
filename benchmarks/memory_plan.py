# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Estimate the memory of training on each GPU from the models themselves: parameters, and the activations that a block saves for the
backward pass, with and without activation checkpointing. Nothing is allocated: the tensors are fake.

    python benchmarks/memory_plan.py --gpu_memory 80

States take 20 bytes per parameter in float32: weights, gradients, two moments of AdamW, and the moving average. DDP keeps all of them
on every GPU, plus a copy of the gradients to send; FSDP2 keeps a share, and gathers the weights of a block when they are needed.
Distillation adds a teacher of 4 bytes per parameter, whole on every GPU. Blocks run in bfloat16 under autocast, whose copies of the
weights are included.
"""

import argparse
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from modeling_flm import FLMConfig, FLMModel
from modeling_flm.utils_flm import CHUNK_ELEMENTS


GIB = 2**30
TEACHER_BYTES = {"FLM": 0, "distillation": 4}
SHAPES = {"170M": (768, 12, 12), "1.3B": (2048, 24, 16), "7B": (4096, 32, 32)}


@dataclass
class Counts:
    name: str
    parameters: int
    block_parameters: int
    saved_per_token: int
    """Bytes that a block saves per token."""
    checkpointed_per_token: int
    """Bytes of the block's input, all that is saved with activation checkpointing."""
    num_blocks: int

    def activations_per_token(self, checkpointing: bool) -> int:
        if checkpointing:
            return self.num_blocks * self.checkpointed_per_token + self.saved_per_token
        return self.num_blocks * self.saved_per_token


def count(name: str, vocab_size: int) -> Counts:
    length = 509  # no other size equals it, so it identifies dimensions of tokens
    hidden_size, num_blocks, num_heads = SHAPES[name]
    config = FLMConfig(
        vocab_size=vocab_size,
        max_position_embeddings=length,
        hidden_size=hidden_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=num_heads,
        attn_logit_softcapping=None,
        attn_implementation="sdpa",
    )
    with FakeTensorMode():
        model = FLMModel(config).train()
        block = model.layers[0]
        state = torch.randn(1, length, hidden_size, requires_grad=True)
        conditioning = torch.randn(1, config.conditioning_size, requires_grad=True)
        tables = torch.randn(2, length, hidden_size // num_heads).unbind()
        shared = {tables[0].untyped_storage()._cdata}  # with all blocks
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            # Neither weights nor their copies in bfloat16
            if storage._cdata not in shared and length in tensor.shape:
                saved[storage._cdata] = (storage.nbytes(), tensor)  # keeps the storage from being reused
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            block(state, conditioning, position_embeddings=tables, attention_mask=None)
        total = sum(nbytes for nbytes, _ in saved.values())
        return Counts(
            name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            block_parameters=sum(parameter.numel() for parameter in block.parameters()),
            saved_per_token=total // length,
            checkpointed_per_token=hidden_size * state.element_size(),
            num_blocks=num_blocks,
        )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=50258, help="vocabulary size")
    parser.add_argument("--length", type=int, default=1024, help="length of the sequences")
    parser.add_argument("--gpu_memory", type=float, default=80, help="memory of each GPU, in GiB")
    parser.add_argument("--num_gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs")
    return parser


def main(args: argparse.Namespace):
    models = [count(name, args.vocab_size) for name in SHAPES]
    print(
        "| model | parameters | states, GiB | a teacher, GiB | activations per sequence, GiB | with checkpointing | "
        "FLOPs per token |"
    )
    print("|---" * 7 + "|")
    for model in models:
        activations = (
            model.activations_per_token(checkpointing) * args.length / GIB for checkpointing in (False, True)
        )
        numbers = [model.parameters * 20 / GIB, model.parameters * 4 / GIB, *activations]
        shown = " | ".join(f"{number:.2f}" for number in numbers)
        # Except for the embedding, each parameter takes 2 operations in the forward pass and 4 in the backward pass.
        flops = 6 * (model.parameters - args.vocab_size * SHAPES[model.name][0])
        print(f"| {model.name} | {model.parameters / 1e6:,.0f}M | {shown} | {flops / 1e9:.2f}G |")

    print(
        f"\nSequences of {args.length} tokens that fit on each GPU of {args.gpu_memory:g} GiB, without and with checkpointing"
    )
    print(
        "| model | GPUs | engine | FLM: states per GPU, GiB | sequences | distillation: states | sequences | GB sent per step |"
    )
    print("|---" * 8 + "|")
    for model in models:
        for num_gpus in args.num_gpus:
            for engine in ("DDP", "FSDP2") if num_gpus > 1 else ("one process",):
                cells = []
                for teacher in TEACHER_BYTES.values():
                    states = {"one process": 20, "DDP": 24, "FSDP2": 20 / num_gpus}[engine] + teacher
                    held = model.parameters * states
                    # The gathered weights of a block, embedding and head, with gradients and copies in bfloat16
                    others = model.parameters - model.num_blocks * model.block_parameters
                    gathered = 10 * (model.block_parameters + others) if engine == "FSDP2" else 2 * model.parameters
                    free = args.gpu_memory * GIB * 0.92 - held - gathered - 20 * CHUNK_ELEMENTS["default"]
                    texts = [
                        max(0, int(free // (model.activations_per_token(checkpointing) * args.length)))
                        for checkpointing in (False, True)
                    ]
                    cells.append(f"{held / GIB:.1f} | " + (" / ".join(map(str, texts)) if free > 0 else "do not fit"))
                # Ring: DDP reduces, scatters and gathers gradients; FSDP2 reduces and scatters them, and gathers weights twice.
                share = (num_gpus - 1) / num_gpus * model.parameters
                sent = {"DDP": 8 * share, "FSDP2": 12 * share}.get(engine, 0) / 1e9
                print(f"| {model.name} | {num_gpus} | {engine} | {' | '.join(cells)} | {sent:.1f} |")


if __name__ == "__main__":
    main(make_parser().parse_args())
