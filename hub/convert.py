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

Such a file is a pickle, which could run any code if it were loaded as one. It is read here by an unpickler that makes
tensors and plain containers, and inert placeholders of everything else; the rest of the file is never interpreted.
"""

import argparse
import math
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modeling_flm import FLMConfig, FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkConfig, FMLMTwoNetworkModel
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
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says why."""


# Reading


class _Placeholder:
    """Stands in for an object of a class that is not built. It keeps what the pickle gives it, and does nothing."""

    state = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = add = append


@dataclass
class _Storage:
    """A member of the archive with numbers."""

    archive: zipfile.ZipFile
    member: str
    dtype: torch.dtype
    size: int


@dataclass
class _Tensor:
    """A tensor of the checkpoint, whose numbers are read when it is loaded."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> torch.Tensor:
        storage = self.storage
        if not isinstance(storage, _Storage):
            raise CheckpointError("its storage is not one of numbers")
        declared = storage.size * storage.dtype.itemsize
        stored = storage.archive.getinfo(storage.member).file_size
        if declared != stored:
            raise CheckpointError(f"it declares {declared:,} bytes of numbers, but {stored:,} are stored")
        if math.prod(self.shape) > storage.size or min(self.shape, default=1) < 0:
            raise CheckpointError(f"its shape {self.shape} has more numbers than the {storage.size:,} that are stored")
        numbers = torch.frombuffer(bytearray(storage.archive.read(storage.member)), dtype=storage.dtype)
        return numbers.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def _rebuild_tensor(storage, offset, shape, stride, *args) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


_BUILT = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *args: tensor,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (dict, list, set, tuple)},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file, encoding="utf-8")
        self.archive, self.root = archive, root

    def find_class(self, module, name):
        return _BUILT.get((module, name), _Placeholder)

    def persistent_load(self, pid):
        _, dtype, key, _, size = pid
        if not isinstance(dtype, torch.dtype):
            return _Placeholder()
        return _Storage(self.archive, f"{self.root}/data/{key}", dtype, int(size))


class Checkpoint:
    """
    A checkpoint of the published code, opened for reading.

    Args:
        path (`str` or `Path`): A file that PyTorch Lightning wrote.

    Raises:
        `CheckpointError`: if the file is none, is damaged or is not what it declares.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        try:
            archive = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile:
            raise CheckpointError(
                f"{path} is truncated, or was not written by `torch.save` of PyTorch 1.6 or newer."
            ) from None
        members = archive.infolist()
        # `torch.save` does not compress. Whatever does would be larger in memory than the file says.
        size, declared = self.path.stat().st_size, sum(member.file_size for member in members)
        if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path} is {size:,} bytes large, but declares {declared:,} bytes of content.")
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is not a checkpoint: it has {len(pickles)} files `data.pkl`, not one.")
        root = pickles[0].removesuffix("/data.pkl")
        byteorder = f"{root}/byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine: save it anew on another.")
        try:
            with archive.open(pickles[0]) as file:
                self.content = _Unpickler(file, archive, root).load()
        except Exception as error:  # whatever a malformed pickle leads to
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(self.content, dict) or not isinstance(self.content.get("state_dict"), dict):
            raise CheckpointError(f"{path} has no `state_dict`: it is not a checkpoint of PyTorch Lightning.")

    def setting(self, *keys: str) -> Any:
        """A value of the pickled configuration, such as `setting("model", "n_heads")`; `None` where there is none."""
        node = self.content.get("hyper_parameters")
        for key in ("config", *keys):
            # omegaconf keeps the content of a node in its state.
            content = node.state.get("_content") if isinstance(node, _Placeholder) and node.state else node
            node = content.get(key) if isinstance(content, dict) else None
        return node.state.get("_val") if isinstance(node, _Placeholder) and node.state else node

    def weights(self, raw: bool = False) -> dict[str, _Tensor]:
        """The averaged weights, or the `raw` ones, by the names that they have in our models."""
        weights = {name: tensor for name, tensor in self.content["state_dict"].items() if isinstance(tensor, _Tensor)}
        # The rotary table is a buffer: it has no average, and our models compute it.
        weights = {_rename(name): tensor for name, tensor in weights.items() if "rotary_emb" not in name}
        if raw:
            return weights
        ema = self.content.get("ema")
        averages = ema.get("shadow_params") if isinstance(ema, dict) else None
        if not isinstance(averages, list):
            raise CheckpointError(f"{self.path} has no averaged weights: pass `--raw-weights` to convert the others.")
        if len(averages) != len(weights) or not all(isinstance(average, _Tensor) for average in averages):
            raise CheckpointError(
                f"{self.path} has {len(averages)} averages for {len(weights)} weights: pass `--raw-weights` to convert "
                "the weights."
            )
        return dict(zip(weights, averages))


def _rename(name: str) -> str:
    for old, new in _RENAMES.items():
        name = name.replace(old, new)
    return name


# Building


def _sizes(checkpoint: Checkpoint, num_heads: int | None, length: int | None) -> dict[str, Any]:
    """The settings of our configurations that a checkpoint's tensors and pickled configuration give."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights(raw=True).items()}
    needed = {
        "embed_tokens.weight": 2,
        "time_embedding.linear_1.weight": 2,
        "layers.0.mlp.up_proj.weight": 2,
    }
    if missing := [name for name, dim in needed.items() if len(shapes.get(name, ())) != dim]:
        raise CheckpointError(f"{checkpoint.path} is not a checkpoint of this architecture: no {', '.join(missing)}.")
    blocks = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    settings = {
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": shapes["embed_tokens.weight"][1],
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": len(blocks),
        "conditioning_size": shapes["time_embedding.linear_1.weight"][0],
        "timestep_embedding_size": shapes["time_embedding.linear_1.weight"][1],
        "num_attention_heads": num_heads or checkpoint.setting("model", "n_heads"),
        "max_position_embeddings": length or checkpoint.setting("model", "length"),
    }
    for name, flag in (("num_attention_heads", "num-heads"), ("max_position_embeddings", "length")):
        if not isinstance(settings[name], int):
            raise CheckpointError(f"{checkpoint.path} does not say its `{name}`: pass `--{flag}`.")
    dropout = checkpoint.setting("model", "dropout")
    if isinstance(dropout, (int, float)):
        settings["dropout"] = dropout
    return settings


def _load(model: PreTrainedModel, weights: dict[str, _Tensor], path: Path):
    """Puts `weights` into a model on the meta device, which has only shapes so far."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in weights]
    problems += [f"unknown: {name} {tensor.shape}" for name, tensor in weights.items() if name not in expected]
    for name in expected.keys() & weights.keys():
        if weights[name].shape != expected[name]:
            problems.append(f"of the wrong shape: {name} {weights[name].shape}, expected {expected[name]}")
    if problems:
        raise CheckpointError("\n    ".join([f"The tensors of {path} do not fit its sizes.", *sorted(problems)]))
    tensors = {}
    for name, tensor in logging.tqdm(weights.items(), desc=f"Reading {path.name}", unit="tensor"):
        try:
            tensors[name] = tensor.load().float()
        except Exception as error:
            raise CheckpointError(f"{path}: the tensor {name} cannot be read: {error}") from error
    model.load_state_dict(tensors, assign=True)


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
        with torch.device("meta"):
            if is_flow_map:
                learned = any(name.startswith("loss_weighting.") for name in weights)
                model = FMLMModel(FMLMConfig(**settings, learned_loss_weighting=learned))
            else:
                model = FLMModel(FLMConfig(**settings))
        _load(model, weights, main.path)
        return model.eval()

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
    learned = any(name.startswith("loss_weighting.") for name in corrections)
    with torch.device("meta"):
        model = FMLMTwoNetworkModel(FMLMTwoNetworkConfig(**settings, learned_loss_weighting=learned))
    _load(model.flow, weights, main.path)
    _load(model.correction, corrections, other.path)
    return model.eval()


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
    parser.add_argument("--num-heads", type=int, help="attention heads, where the checkpoint does not say")
    parser.add_argument("--length", type=int, help="length of the texts, where the checkpoint does not say")
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if output.exists():
        parser.error(f"--output: {output} exists already; name another folder")

    try:
        model = convert(args.checkpoint, args.correction, args.raw_weights, args.num_heads, args.length)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = add_special_tokens(AutoTokenizer.from_pretrained(args.tokenizer))
        if len(tokenizer) != model.config.vocab_size:
            parser.error(f"--tokenizer: it has {len(tokenizer)} tokens, but the model has {model.config.vocab_size}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            setattr(model.generation_config, name, getattr(tokenizer, name))

    # The folder appears when it is complete.
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        Path(folder).chmod(0o755)
        Path(folder).rename(output)
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters: {output}")


if __name__ == "__main__":
    main()
