# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Turns a checkpoint of the paper's published code into a model folder.

    python -m hub.convert --checkpoint flm.ckpt --tokenizer bert-base-uncased --output flm
    python -m hub.convert --checkpoint flm.ckpt --correction stage1.ckpt --output fmlm_two_network
    python -m hub.convert --checkpoint stage2.ckpt --tokenizer gpt2 --output fmlm

Such a file is a pickle, which could run any code if it were loaded as one. It is read here without `pickle`: its
instructions make plain containers and tensors, and inert placeholders of everything else.
"""

import argparse
import math
import pickletools
import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from trainers.data import add_special_tokens


# Parts of the names of published parameters, in the order in which they are replaced.
_RENAMES = {
    "backbone.": "",
    "_orig_mod.": "",  # torch.compile
    "vocab_embed.embedding": "embed_tokens.weight",
    "sigma_map_prime": "target_sigma_map",
    "learnable_loss_weighting.s_embed.mlp.0": "loss_weighting.time_embedding.linear_1",
    "learnable_loss_weighting.s_embed.mlp.2": "loss_weighting.time_embedding.linear_2",
    "learnable_loss_weighting.mlp.0": "loss_weighting.linear_1",
    "learnable_loss_weighting.mlp.2": "loss_weighting.linear_2",
    "target_sigma_map.mlp.0": "target_time_embedding.linear_1",
    "target_sigma_map.mlp.2": "target_time_embedding.linear_2",
    "sigma_map.mlp.0": "time_embedding.linear_1",
    "sigma_map.mlp.2": "time_embedding.linear_2",
    "blocks.": "layers.",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_out": "self_attn.o_proj",
    "mlp.0": "mlp.up_proj",
    "mlp.2": "mlp.down_proj",
    "adaLN_modulation": "modulation",
    "output_layer.norm_final": "norm",
    "output_layer.linear": "lm_head",
    "output_layer.": "",
}

# What the published code calls the first stage of its distillation, whose checkpoint has the correction network alone.
_CORRECTION_ALGORITHM = "flm_distill"

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}

_MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says why."""


# Reading


class _Object:
    """Stands in for a class, a function, or what they would make. It keeps what the pickle gives it, and does nothing."""

    __slots__ = ("name", "state")

    def __init__(self, name: str):
        self.name, self.state = name, None


@dataclass(frozen=True, slots=True)
class _Storage:
    """A member of the archive with numbers."""

    member: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the checkpoint, whose numbers are still in the archive."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


def _is_sizes(value: Any) -> bool:
    return type(value) is tuple and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _reduce(function: Any, arguments: Any) -> Any:
    """What calling `function` stands for: a tensor or a dictionary where it is known, and else nothing."""
    name = function.name if isinstance(function, _Object) else ""
    if name == "collections.OrderedDict":
        return {}
    if name == "torch._utils._rebuild_parameter" and type(arguments) is tuple and arguments:
        return arguments[0]
    if name == "torch._utils._rebuild_tensor_v2" and type(arguments) is tuple and len(arguments) >= 4:
        storage, offset, shape, stride = arguments[:4]
        sizes_are_sizes = _is_sizes((offset,)) and _is_sizes(shape) and _is_sizes(stride)
        if isinstance(storage, _Storage) and sizes_are_sizes and len(shape) == len(stride) <= 8:
            return _Tensor(storage, offset, shape, stride)
    return _Object(name)


def _persistent(identifier: Any, root: str) -> Any:
    """The storage with an identifier as `torch.save` writes it."""
    if type(identifier) is tuple and len(identifier) == 5:
        _, kind, key, _, size = identifier
        dtype = _STORAGES.get(kind.name.removeprefix("torch.")) if isinstance(kind, _Object) else None
        if dtype is not None and type(key) is str and _is_sizes((size,)):
            return _Storage(f"{root}/data/{key}", dtype, size)
    return _Object("storage")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def _interpret(data: bytes, root: str) -> Any:
    """
    What a pickle describes, as plain containers, numbers, strings, tensors and [`_Object`]s. Its opcodes are followed here
    and not by `pickle`: nothing is imported, called, hashed but for strings and numbers, or given attributes.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        position = len(stack) - 1
        while stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark")
        items = stack[position + 1 :]
        del stack[position:]
        return items

    def set_items(target: Any, items: list[Any]):
        if type(target) is dict:
            plain = (str, int, float, bool, type(None))
            target.update((key, value) for key, value in zip(items[::2], items[1::2]) if type(key) in plain)

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": (), "EMPTY_SET": []}[name])
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            items = pop_to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else pop_to_mark()
            if type(stack[-1]) is list:
                stack[-1].extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = pop_to_mark()
            set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_Object(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Object(f"{module}.{attribute}" if type(module) is type(attribute) is str else ""))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == "NEWOBJ_EX":
            del stack[-3:]
            stack.append(_Object(""))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Object):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(_persistent(stack.pop(), root))
        elif name.startswith(("BININT", "LONG", "BINFLOAT", "BINUNICODE", "SHORT_BIN", "BINBYTES", "BINSTRING")):
            stack.append(argument)
        else:
            raise ValueError(f"it has the opcode {name}, which `torch.save` does not write")
    raise ValueError("it has no end")


class Checkpoint:
    """
    A checkpoint of the published code, opened for reading.

    Args:
        path (`str` or `Path`): A file that PyTorch Lightning wrote.

    Raises:
        `CheckpointError`: if the file is not a checkpoint, is damaged, or is not what it declares.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.content = self._read()
        except CheckpointError:
            raise
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{path} is truncated or damaged, or was not written by `torch.save` of PyTorch 1.6 or newer."
            ) from None
        except Exception as error:  # there is no end to what can be wrong with a file
            raise CheckpointError(f"{path} cannot be read: {_describe(error)}") from error

    def _read(self) -> dict[str, Any]:
        members = self.archive.infolist()
        # `torch.save` does not compress. Whatever does would be larger in memory than the file says.
        size, declared = self.path.stat().st_size, sum(member.file_size for member in members)
        if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{self.path} is {size:,} bytes large, but declares {declared:,} bytes of content.")
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path} is not a checkpoint: it has {len(pickles)} files `data.pkl`, not one.")
        root = pickles[0].removesuffix("/data.pkl")
        byteorder = f"{root}/byteorder"
        if byteorder in self.archive.namelist() and self.archive.read(byteorder) != b"little":
            raise CheckpointError(f"{self.path} was written on a big-endian machine: save it anew on another.")
        content = _interpret(self.archive.read(pickles[0]), root)
        if type(content) is not dict or type(content.get("state_dict")) is not dict:
            raise CheckpointError(f"{self.path} has no `state_dict`: it is not a checkpoint of PyTorch Lightning.")
        return content

    def setting(self, *keys: str) -> Any:
        """A value of the pickled configuration, such as `setting("model", "n_heads")`; `None` where there is none."""
        node = self.content.get("hyper_parameters")
        for key in ("config", *keys):
            node = _content_of(node)
            node = node.get(key) if type(node) is dict else None
        return _content_of(node)

    def weights(self, raw: bool = False) -> dict[str, _Tensor]:
        """The averaged weights, or the `raw` ones, by the names that they have in our models."""
        weights = {}
        for name, tensor in self.content["state_dict"].items():
            # The rotary table is a buffer: it has no average, and our models compute it.
            if type(name) is not str or not isinstance(tensor, _Tensor) or "rotary_emb" in name:
                continue
            if (renamed := _rename(name)) in weights:
                raise CheckpointError(f"{self.path} has two tensors for {renamed!r}.")
            weights[renamed] = tensor
        if raw:
            return weights
        ema = self.content.get("ema")
        averages = ema.get("shadow_params") if type(ema) is dict else None
        if type(averages) is not list:
            raise CheckpointError(f"{self.path} has no averaged weights: pass `--raw-weights` to convert the others.")
        if len(averages) != len(weights) or not all(isinstance(average, _Tensor) for average in averages):
            raise CheckpointError(
                f"{self.path} has {len(averages)} averages for {len(weights)} weights: pass `--raw-weights` to convert "
                "the weights."
            )
        return dict(zip(weights, averages))

    def load(self, tensor: _Tensor) -> torch.Tensor:
        """The numbers of a tensor, in float32."""
        storage = tensor.storage
        declared, stored = storage.size * storage.dtype.itemsize, self.archive.getinfo(storage.member).file_size
        if declared != stored:
            raise ValueError(f"it declares {declared:,} bytes of numbers, but {stored:,} are stored")
        numbers = torch.frombuffer(bytearray(self.archive.read(storage.member)), dtype=storage.dtype)
        tensor = numbers.as_strided(tensor.shape, tensor.stride, tensor.offset)
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _content_of(node: Any) -> Any:
    """What a node of omegaconf holds, which it keeps in its state."""
    state = node.state if isinstance(node, _Object) else None
    if type(state) is not dict:
        return node
    return state.get("_content", state.get("_val"))


def _describe(error: Exception) -> str:
    """An error in one line, without what a hostile file may have put into it."""
    message = str(error).encode("ascii", "backslashreplace").decode()
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"


def _rename(name: str) -> str:
    for old, new in _RENAMES.items():
        name = name.replace(old, new)
    return name


# Building


def _sizes(checkpoint: Checkpoint, num_heads: int | None, length: int | None) -> dict[str, Any]:
    """The settings of our configurations that a checkpoint's tensors and pickled configuration give."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights(raw=True).items()}
    needed = ("embed_tokens.weight", "time_embedding.linear_1.weight", "layers.0.mlp.up_proj.weight")
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise CheckpointError(f"{checkpoint.path} is not a checkpoint of this architecture: no {', '.join(missing)}.")
    blocks = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    settings = {
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": shapes["embed_tokens.weight"][1],
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": len(blocks),
        "conditioning_size": shapes["time_embedding.linear_1.weight"][0],
        "timestep_embedding_size": shapes["time_embedding.linear_1.weight"][1],
        "num_attention_heads": checkpoint.setting("model", "n_heads") if num_heads is None else num_heads,
        "max_position_embeddings": checkpoint.setting("model", "length") if length is None else length,
    }
    for name, flag in (("num_attention_heads", "num-heads"), ("max_position_embeddings", "length")):
        if type(settings[name]) is not int or not 0 < settings[name] < 2**24:
            raise CheckpointError(
                f"{checkpoint.path} does not say its `{name}`: pass a positive number as `--{flag}`."
            )
    dropout = checkpoint.setting("model", "dropout")
    if type(dropout) in (int, float) and 0 <= dropout < 1:
        settings["dropout"] = dropout
    return settings


def _build(
    model_class: type[PreTrainedModel],
    settings: dict[str, Any],
    networks: dict[str, tuple[Checkpoint, dict[str, _Tensor]]],
) -> PreTrainedModel:
    """A model with the weights of each of its networks, given by the beginning of their names."""

    def build(**changes) -> PreTrainedModel:
        try:
            with torch.device("meta"):
                return model_class(model_class.config_class(**{**settings, **changes}))
        except Exception as error:
            raise CheckpointError(f"There is no model of these sizes. {_describe(error)}") from error

    # What a model needs is known from one with a single block: only if it is all there, it is built.
    prefixed = {prefix + name: tensor for prefix, (_, weights) in networks.items() for name, tensor in weights.items()}
    expected = {}
    for name, tensor in build(num_hidden_layers=1).state_dict().items():
        for block in range(settings["num_hidden_layers"] if "layers.0." in name else 1):
            expected[name.replace("layers.0.", f"layers.{block}.")] = tuple(tensor.shape)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in prefixed]
    problems += [f"unknown: {name!r} {tensor.shape}" for name, tensor in prefixed.items() if name not in expected]
    for name in expected.keys() & prefixed.keys():
        if prefixed[name].shape != expected[name]:
            problems.append(f"of the wrong shape: {name} {prefixed[name].shape}, expected {expected[name]}")
    paths = " and ".join(str(checkpoint.path) for checkpoint, _ in networks.values())
    if problems:
        listed = sorted(problems)[:_MAX_LISTED]
        listed += [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
        raise CheckpointError("\n    ".join([f"The tensors of {paths} do not fit its sizes.", *listed]))

    tensors = {}
    for prefix, (checkpoint, weights) in networks.items():
        size, needed = checkpoint.path.stat().st_size, sum(tensor.num_bytes for tensor in weights.values())
        if needed > size:
            raise CheckpointError(f"{checkpoint.path} is {size:,} bytes large, but its tensors need {needed:,}.")
        for name, tensor in logging.tqdm(weights.items(), desc=f"Reading {checkpoint.path.name}", unit="tensor"):
            try:
                tensors[prefix + name] = checkpoint.load(tensor)
            except Exception as error:
                raise CheckpointError(f"{checkpoint.path}: {name} cannot be read: {_describe(error)}") from error
    model = build()
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def convert(
    checkpoint: str | Path,
    correction: str | Path | None = None,
    raw_weights: bool = False,
    num_heads: int | None = None,
    length: int | None = None,
) -> PreTrainedModel:
    """
    Builds the model of a published checkpoint.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint of an FLM, or of a flow map that is one network.
        correction (`str` or `Path`, *optional*):
            The checkpoint of the correction network of the first distillation stage, of which `checkpoint` is the flow.
        raw_weights (`bool`, *optional*, defaults to `False`):
            Whether to take the weights of the training and not their moving average.
        num_heads (`int`, *optional*):
            The number of attention heads, where the checkpoint does not say.
        length (`int`, *optional*):
            The length of the texts in tokens, where the checkpoint does not say.

    Returns:
        [`FLMModel`], [`FMLMModel`], or with a `correction` [`FMLMTwoNetworkModel`], in float32 and evaluation mode.

    Raises:
        `CheckpointError`: if a file is no such checkpoint, or its tensors do not fit.
    """
    main = Checkpoint(checkpoint)
    weights = main.weights(raw_weights)
    settings = _sizes(main, num_heads, length)
    is_flow_map = any(name.startswith("target_time_embedding.") for name in weights)
    if correction is None:
        if is_flow_map and main.setting("algo", "name") == _CORRECTION_ALGORITHM:
            raise CheckpointError(
                f"{checkpoint} is the correction network of the first distillation stage: pass it as `--correction`, and the "
                "FLM that it corrects as `--checkpoint`."
            )
        if is_flow_map:
            settings["learned_loss_weighting"] = any(name.startswith("loss_weighting.") for name in weights)
        return _build(FMLMModel if is_flow_map else FLMModel, settings, {"": (main, weights)})

    other = Checkpoint(correction)
    if is_flow_map:
        raise CheckpointError(f"{checkpoint} is a flow map: with `--correction`, `--checkpoint` must be an FLM.")
    corrections = other.weights(raw_weights)
    if not any(name.startswith("target_time_embedding.") for name in corrections):
        raise CheckpointError(f"{correction} is not a flow map: `--correction` must be one of the first stage.")
    if other.setting("algo", "name") not in (None, _CORRECTION_ALGORITHM):
        raise CheckpointError(
            f"{correction} is of {other.setting('algo', 'name')!r}, a flow map by itself: pass it as `--checkpoint`."
        )
    other_settings = _sizes(other, num_heads, length)
    if different := [name for name in settings if settings[name] != other_settings[name] and name != "dropout"]:
        raise CheckpointError(
            f"{checkpoint} and {correction} do not go together: they differ in {', '.join(different)}."
        )
    settings["learned_loss_weighting"] = any(name.startswith("loss_weighting.") for name in corrections)
    networks = {"flow.": (main, weights), "correction.": (other, corrections)}
    return _build(FMLMTwoNetworkModel, settings, networks)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="the checkpoint of an FLM, or of a flow map of one network"
    )
    parser.add_argument(
        "--correction", help="the checkpoint of the first distillation stage, with the FLM as --checkpoint"
    )
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer, which is saved with the model")
    parser.add_argument("--output", required=True, help="the folder to write, which must not exist")
    parser.add_argument("--raw-weights", action="store_true", help="the weights of the training, not their average")
    parser.add_argument("--num-heads", type=_positive, help="attention heads, where the checkpoint does not say")
    parser.add_argument("--length", type=_positive, help="length of the texts, where the checkpoint does not say")
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if output.exists():
        parser.error(f"--output: {output} exists already; name another folder")

    tokenizer = None
    if args.tokenizer is not None:
        try:
            tokenizer = add_special_tokens(AutoTokenizer.from_pretrained(args.tokenizer))
        except (OSError, ValueError) as error:
            parser.error(f"--tokenizer: {error}")
    try:
        model = convert(args.checkpoint, args.correction, args.raw_weights, args.num_heads, args.length)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    if tokenizer is not None:
        if len(tokenizer) != model.config.vocab_size:
            parser.error(f"--tokenizer: it has {len(tokenizer)} tokens, but the model has {model.config.vocab_size}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            setattr(model.generation_config, name, getattr(tokenizer, name))

    # The folder appears when it is complete.
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        Path(folder).chmod(0o755)
        Path(folder).rename(output)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters: {output}")


if __name__ == "__main__":
    main()
