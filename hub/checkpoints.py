# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Reads the checkpoints of the paper's published code: files of PyTorch Lightning, and what `PyTorchModelHubMixin` writes to a
folder or a Hub repository.

A file of Lightning is a pickle, which could run any code if it were loaded as one. It is read here without `pickle`: its
instructions make plain containers and tensors, and inert placeholders of everything else. (The restricted unpickler of
`torch.load` is no substitute: it crashes, hangs or takes all memory with files that are a few bytes large.)
"""

import json
import math
import pickletools
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .records import is_hub_name


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

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says why."""


# Pickles that are not unpickled


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


# No class, no module and no storage of a checkpoint has a longer name. Names that are put together from strings which a
# pickle has once could take any memory.
_MAX_NAME = 200

_MAX_DIMENSIONS = 8


def _is_sizes(value: Any) -> bool:
    if type(value) is not tuple or len(value) > _MAX_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 2**48 for size in value)


def _is_name(value: Any) -> bool:
    return type(value) is str and len(value) <= _MAX_NAME


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
        if isinstance(storage, _Storage) and sizes_are_sizes and len(shape) == len(stride):
            return _Tensor(storage, offset, shape, stride)
    return _Object(name)


def _persistent(identifier: Any, root: str) -> Any:
    """The storage with an identifier as `torch.save` writes it."""
    if type(identifier) is tuple and len(identifier) == 5:
        _, kind, key, _, size = identifier
        dtype = _STORAGES.get(kind.name.removeprefix("torch.")) if isinstance(kind, _Object) else None
        if dtype is not None and _is_name(key) and _is_sizes((size,)):
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
            stack.append(_Object(argument.replace(" ", ".", 1) if _is_name(argument) else ""))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Object(f"{module}.{attribute}" if _is_name(module) and _is_name(attribute) else ""))
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


def _content_of(node: Any) -> Any:
    """What a node of omegaconf holds, which it keeps in its state."""
    state = node.state if isinstance(node, _Object) else None
    if type(state) is not dict:
        return node
    return state.get("_content", state.get("_val"))


def describe(error: Exception) -> str:
    """An error in one line, without what a hostile file may have put into it."""
    message = str(error).encode("ascii", "backslashreplace").decode()
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"


# The kinds of checkpoints


class Checkpoint(ABC):
    """
    The weights and the settings of a model of the published code, by the names that the weights have in our models.

    Attributes:
        name (`str`): What messages call it.
        has_settings (`bool`): Whether there is a configuration of the training.
    """

    name: str
    has_settings: bool

    @abstractmethod
    def setting(self, *keys: str) -> Any:
        """A value of the configuration, such as `setting("model", "n_heads")`; `None` where there is none."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Any]:
        """The tensors of the network by name. Each has a `shape`, and is read by `load`."""

    @abstractmethod
    def weights(self, raw: bool = False) -> dict[str, Any]:
        """The averaged weights, or the `raw` ones, like `tensors`."""

    @abstractmethod
    def load(self, tensor: Any) -> torch.Tensor:
        """The numbers of one of the `weights`, in float32."""

    @abstractmethod
    def check_size(self, weights: dict[str, Any]):
        """Raises a [`CheckpointError`] if the weights would take more memory than the file."""

    @property
    def algorithm(self) -> str | None:
        """What the published code called the training."""
        name = self.setting("algo", "name")
        return name if isinstance(name, str) else None

    def _rename(self, tensors: dict[Any, Any]) -> dict[str, Any]:
        """Tensors by the names in our models, without the rotary table, a buffer that these compute."""
        weights = {}
        for name, tensor in tensors.items():
            if type(name) is not str or "rotary_emb" in name:
                continue
            renamed = name
            for old, new in _RENAMES.items():
                renamed = renamed.replace(old, new)
            if renamed in weights:
                raise CheckpointError(f"{self.name} has two tensors for {renamed!r}.")
            weights[renamed] = tensor
        return weights


class LightningCheckpoint(Checkpoint):
    """
    A checkpoint file of the published code.

    Args:
        path (`str` or `Path`): A file that PyTorch Lightning wrote.

    Raises:
        `CheckpointError`: if the file is not a checkpoint, is damaged, or is not what it declares.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), str(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        self.size = self.path.stat().st_size
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
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error
        self.has_settings = type(_content_of(self._hyper_parameters())) is dict

    def _read(self) -> dict[str, Any]:
        members = self.archive.infolist()
        # `torch.save` does not compress. Whatever does would be larger in memory than the file says.
        declared = sum(member.file_size for member in members)
        if declared > self.size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(
                f"{self.path} is {self.size:,} bytes large, but declares {declared:,} bytes of content."
            )
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

    def _hyper_parameters(self) -> Any:
        hyper_parameters = _content_of(self.content.get("hyper_parameters"))
        return hyper_parameters.get("config") if type(hyper_parameters) is dict else None

    def setting(self, *keys: str) -> Any:
        node = self._hyper_parameters()
        for key in keys:
            node = _content_of(node)
            node = node.get(key) if type(node) is dict else None
        return _content_of(node)

    @cached_property
    def tensors(self) -> dict[str, _Tensor]:
        tensors = self.content["state_dict"].items()
        return self._rename({name: tensor for name, tensor in tensors if isinstance(tensor, _Tensor)})

    def weights(self, raw: bool = False) -> dict[str, _Tensor]:
        weights = self.tensors
        if raw:
            return weights
        ema = self.content.get("ema")
        averages = ema.get("shadow_params") if type(ema) is dict else None
        if type(averages) is not list:
            raise CheckpointError(f"{self.path} has no averaged weights: pass `--raw_weights` to convert the others.")
        if len(averages) != len(weights) or not all(isinstance(average, _Tensor) for average in averages):
            raise CheckpointError(
                f"{self.path} has {len(averages)} averages for {len(weights)} weights: pass `--raw_weights` to convert "
                "the weights."
            )
        return dict(zip(weights, averages))

    def check_size(self, weights: dict[str, _Tensor]):
        needed = sum(tensor.num_bytes for tensor in weights.values())
        if needed > self.size:
            raise CheckpointError(f"{self.path} is {self.size:,} bytes large, but its tensors need {needed:,}.")

    def load(self, tensor: _Tensor) -> torch.Tensor:
        storage = tensor.storage
        declared, stored = storage.size * storage.dtype.itemsize, self.archive.getinfo(storage.member).file_size
        if declared != stored:
            raise ValueError(f"it declares {declared:,} bytes of numbers, but {stored:,} are stored")
        numbers = torch.frombuffer(bytearray(self.archive.read(storage.member)), dtype=storage.dtype)
        tensor = numbers.as_strided(tensor.shape, tensor.stride, tensor.offset)
        return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a safetensors file, whose numbers are still there."""

    key: str
    shape: tuple[int, ...]
    dtype: str


class HubCheckpoint(Checkpoint):
    """
    What `PyTorchModelHubMixin` writes of the published network: the averaged weights, and the configuration of the training.

    Args:
        config (`str` or `Path`): The `config.json`.
        weights (`str` or `Path`): The `model.safetensors`.
        name (`str`): What messages call it.

    Raises:
        `CheckpointError`: if one of the files is damaged, or is another kind of model.
    """

    def __init__(self, config: str | Path, weights: str | Path, name: str):
        self.name, self.path = name, Path(weights)
        self.settings = self._read_settings(Path(config))
        # With a network that was built inside the training code the mixin saves no more than this.
        self.has_settings = any(type(value) is dict for value in self.settings.values())
        if "model_type" in self.settings:
            raise CheckpointError(
                f"{name} is no checkpoint of the published code but a model of transformers "
                f"({self.settings['model_type']!r}): load it with `AutoModel.from_pretrained`."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                self.entries = {key: _Entry(key, tuple(x.get_shape()), x.get_dtype()) for key, x in slices.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: {SAFE_WEIGHTS_NAME} is truncated or damaged: {describe(error)}") from error

    def _read_settings(self, path: Path) -> dict[str, Any]:
        try:
            if path.stat().st_size > _MAX_SETTINGS:
                raise ValueError(f"it is larger than {_MAX_SETTINGS:,} bytes")
            settings = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: {CONFIG_NAME} cannot be read: {describe(error)}") from error
        if type(settings) is not dict:
            raise CheckpointError(f"{self.name}: {CONFIG_NAME} is not a dictionary of settings.")
        return settings

    def setting(self, *keys: str) -> Any:
        node = self.settings
        for key in keys:
            node = node.get(key) if type(node) is dict else None
        return node

    @cached_property
    def tensors(self) -> dict[str, _Entry]:
        return self._rename(self.entries)

    def weights(self, raw: bool = False) -> dict[str, _Entry]:
        if raw:
            raise CheckpointError(f"{self.name} has the averaged weights only: leave out `--raw_weights`.")
        return self.tensors

    def check_size(self, weights: dict[str, _Entry]):
        pass  # safetensors opens no file that declares more than it has

    def load(self, tensor: _Entry) -> torch.Tensor:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"it has numbers of type {tensor.dtype}, not one of {', '.join(_DTYPES)}")
        # Opened anew for each, and copied: pages of an open file count as memory, too.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(tensor.key).to(torch.float32, copy=True)


# What safetensors calls the types that published weights may have: others would be quantized
_DTYPES = ("F64", "F32", "F16", "BF16")

# Of a configuration that is not read if it is larger
_MAX_SETTINGS = 2**22


def download(repo_id: str, revision: str | None = None, token: str | None = None) -> HubCheckpoint:
    """
    The checkpoint in a repository of the Hub, or in the cache.

    Args:
        repo_id (`str`): The name of the repository.
        revision (`str`, *optional*): A branch, a tag or a commit.
        token (`str`, *optional*): A token with the right to read. By default the one of `hf auth login`.

    Returns:
        [`HubCheckpoint`]

    Raises:
        `CheckpointError`: if there is no such repository, revision or file, no right to read it, or no connection.
    """
    name = repo_id if revision is None else f"{repo_id} at {revision}"
    paths = []
    for filename in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
        try:
            paths.append(hf_hub_download(repo_id, filename, revision=revision, token=token))
        except GatedRepoError as error:  # before its base class, `RepositoryNotFoundError`
            raise CheckpointError(
                f"{name} is gated: ask for access on its page, and log in with `hf auth login` or pass `--token`."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"There is no {repo_id} on this machine, and no such repository on the Hub. If it is private, log in with `hf "
                "auth login`, or pass a `--token` that may read it."
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{repo_id} has no revision {revision!r}: pass another `--revision`.") from error
        except LocalEntryNotFoundError as error:  # before its base class, `EntryNotFoundError`
            raise CheckpointError(f"{name}: {filename} is not in the cache, and the Hub cannot be reached.") from error
        except EntryNotFoundError as error:
            raise CheckpointError(
                f"{name} has no {filename}: it is no repository that `PyTorchModelHubMixin` wrote."
            ) from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise CheckpointError(
                    f"The Hub does not accept the token for {name}: log in with `hf auth login`, or pass another `--token`."
                ) from error
            raise CheckpointError(f"{name}: {filename} cannot be had from the Hub. {describe(error)}") from error
        except Exception as error:  # of the network, of the disk, of names
            raise CheckpointError(f"{name}: {filename} cannot be had from the Hub. {describe(error)}") from error
    return HubCheckpoint(*paths, name)


def open_checkpoint(
    source: str | Path | Checkpoint, revision: str | None = None, token: str | None = None
) -> Checkpoint:
    """
    A checkpoint from wherever it is.

    Args:
        source (`str`, `Path` or [`Checkpoint`]):
            A file of Lightning, a folder with `config.json` and `model.safetensors`, or the name of a Hub repository. What is
            open already is returned.
        revision (`str`, *optional*): A branch, a tag or a commit of the repository.
        token (`str`, *optional*): A token with the right to read the repository.

    Returns:
        [`Checkpoint`]

    Raises:
        `CheckpointError`: if there is no such thing, or it is damaged.
    """
    if isinstance(source, Checkpoint):
        return source
    source = str(source).rstrip("/") or str(source)  # as shells complete names
    path = Path(source)
    is_repository = (
        not path.exists() and source.count("/") == 1 and path.suffix not in _SUFFIXES and is_hub_name(source)
    )
    if revision is not None and not is_repository:
        raise CheckpointError(f"`--revision` is of a Hub repository, such as owner/name, and {source} is none.")
    if path.is_dir():
        for filename in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
            if not (path / filename).is_file():
                files = sorted(file.name for file in path.glob("*.ckpt"))
                hint = f" To convert {files[0]}, name the file." if files else ""
                raise CheckpointError(
                    f"{source} has no {filename}: it is no folder that `PyTorchModelHubMixin` wrote.{hint}"
                )
        return HubCheckpoint(path / CONFIG_NAME, path / SAFE_WEIGHTS_NAME, source)
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(f"{source}: pass the folder, whose {CONFIG_NAME} has the settings.")
    return download(source, revision, token) if is_repository else LightningCheckpoint(source)


# What tells a file that is not there from a repository
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
