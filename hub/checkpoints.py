# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Reads the checkpoints of the paper's published code: files of PyTorch Lightning, and what `PyTorchModelHubMixin` writes to a
folder or a Hub repository.

A Lightning file is a pickle, which can run any code when it is loaded. It is loaded here with `torch.load(weights_only=True)`,
with inert stand-ins for all classes and functions that torch does not know, so nothing in it runs. (A file that was made
for the purpose can still exhaust the memory or crash the process.)
"""

import json
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
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


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says why."""


class _Inert:
    """
    Stands in for the classes and functions that a checkpoint names and that torch does not load by itself. Whatever it is
    called with, it makes an object that keeps the state it is given, and does nothing else.
    """

    state: Any = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state: Any):
        self.state = state


def _empty_dict(*arguments) -> dict[Any, Any]:
    """Stands in for `defaultdict`, because torch fills plain dictionaries only."""
    return {}


def _load_inert(path: Path, keep_storage: Callable[[torch.UntypedStorage, str], torch.UntypedStorage]) -> Any:
    """
    Loads a checkpoint with a stand-in for every name in it but the few that torch needs to rebuild tensors. The file is mapped
    into memory, so no tensor is read.
    """
    # Names that this process has declared safe for other files get stand-ins as well.
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(_empty_dict if name == "collections.defaultdict" else _Inert, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location=keep_storage, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch surrounds its reason with the advice to run the code in the file.
        raise ValueError(str(error).split("\n\n")[-2:][0]) from None
    finally:
        torch.serialization.add_safe_globals(trusted)


def _is_weight(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided


def _content_of(node: Any) -> Any:
    """What a node of omegaconf holds, which it keeps in its state."""
    state = node.state if isinstance(node, _Inert) else None
    if not isinstance(state, dict):
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
        self.has_settings = isinstance(_content_of(self._hyper_parameters()), dict)

    def _read(self) -> dict[str, Any]:
        members = self.archive.infolist()
        # `torch.save` does not compress. A compressed member would be larger in memory than in the file.
        declared = sum(member.file_size for member in members)
        if declared > self.size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(
                f"{self.path} is {self.size:,} bytes large, but declares {declared:,} bytes of content."
            )
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path} is not a checkpoint: it has {len(pickles)} files `data.pkl`, not one.")
        storages = []

        def keep_storage(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
            storages.append(storage)
            return storage

        content = _load_inert(self.path, keep_storage)
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise CheckpointError(f"{self.path} has no `state_dict`: it is not a checkpoint of PyTorch Lightning.")
        # Storages are parts of one mapping of the file: in the order of their addresses they are its members in their order.
        folder = pickles[0].removesuffix(".pkl") + "/"
        stored = [member for member in members if member.filename.startswith(folder) and member.file_size > 0]
        stored.sort(key=lambda member: member.header_offset)
        storages = sorted((storage for storage in storages if storage.nbytes() > 0), key=torch.UntypedStorage.data_ptr)
        if [storage.nbytes() for storage in storages] != [member.file_size for member in stored]:
            raise ValueError("the sizes of its tensors are not the sizes of what is stored for them")
        self.members = dict(zip(map(torch.UntypedStorage.data_ptr, storages), stored))
        return content

    def _hyper_parameters(self) -> Any:
        hyper_parameters = _content_of(self.content.get("hyper_parameters"))
        return hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None

    def setting(self, *keys: str) -> Any:
        node = self._hyper_parameters()
        for key in keys:
            node = _content_of(node)
            node = node.get(key) if isinstance(node, dict) else None
        return _content_of(node)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = self.content["state_dict"].items()
        return self._rename({name: tensor for name, tensor in tensors if _is_weight(tensor)})

    def weights(self, raw: bool = False) -> dict[str, torch.Tensor]:
        weights = self.tensors
        if raw:
            return weights
        ema = self.content.get("ema")
        averages = ema.get("shadow_params") if isinstance(ema, dict) else None
        if type(averages) is not list:
            raise CheckpointError(f"{self.path} has no averaged weights: pass `--raw_weights` to convert the others.")
        if len(averages) != len(weights) or not all(map(_is_weight, averages)):
            raise CheckpointError(
                f"{self.path} has {len(averages)} averages for {len(weights)} weights: pass `--raw_weights` to convert "
                "the weights."
            )
        return dict(zip(weights, averages))

    def check_size(self, weights: dict[str, torch.Tensor]):
        needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        if needed > self.size:
            raise CheckpointError(f"{self.path} is {self.size:,} bytes large, but its tensors need {needed:,}.")

    def load(self, tensor: torch.Tensor) -> torch.Tensor:
        # Not from the mapping: this checks the checksum, and pages of a mapping count as memory.
        member = self.members[tensor.untyped_storage().data_ptr()]
        numbers = torch.frombuffer(bytearray(self.archive.read(member)), dtype=tensor.dtype)
        tensor = numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
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
