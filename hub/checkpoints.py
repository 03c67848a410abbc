# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Reads checkpoints of the paper's published code: PyTorch Lightning files, and folders or Hub repositories of
`PyTorchModelHubMixin`.

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

from modeling_flm.utils_flm import describe_damage, describe_other_content

from .records import is_hub_name


# Parts of published parameter names and their replacements, in order.
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
    """Raised if a checkpoint cannot be converted, with the reason."""


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
    """Returns the value of an omegaconf node, which is in its state."""
    state = node.state if isinstance(node, _Inert) else None
    if not isinstance(state, dict):
        return node
    return state.get("_content", state.get("_val"))


def describe(error: Exception) -> str:
    """Describes an error in one line of printable ASCII, whatever a hostile file has put into it."""
    message = str(error).encode("ascii", "backslashreplace").decode()
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"


class Checkpoint(ABC):
    """
    Weights and settings of a model of the published code. Weights have their names in our models.

    Attributes:
        name (`str`): Name of the checkpoint in messages.
        has_settings (`bool`): Whether the checkpoint has the configuration of its training.
    """

    name: str
    has_settings: bool

    @abstractmethod
    def setting(self, *keys: str) -> Any:
        """Returns a value of the configuration, such as `setting("model", "n_heads")`, or `None`."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Any]:
        """The tensors of the network by name. Each has a `shape`; `load` reads its values."""

    @abstractmethod
    def weights(self, raw: bool = False) -> dict[str, Any]:
        """Returns the averaged weights, or the `raw` ones, as `tensors` does."""

    @abstractmethod
    def load(self, tensor: Any) -> torch.Tensor:
        """Reads the values of a weight, in float32."""

    @abstractmethod
    def check_size(self, weights: dict[str, Any]):
        """Raises a [`CheckpointError`] if the weights would take more memory than the file."""

    @property
    def algorithm(self) -> str | None:
        """Published name of the training algorithm."""
        name = self.setting("algo", "name")
        return name if isinstance(name, str) else None

    def _rename(self, tensors: dict[Any, Any]) -> dict[str, Any]:
        """Renames tensors as in our models, without the rotary table, which our models compute."""
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
        path (`str` or `Path`): PyTorch Lightning file.

    Raises:
        `CheckpointError`: if the file is not a checkpoint, is damaged, or declares wrong sizes.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), str(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file.")
        self.size = self.path.stat().st_size
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.content = self._read()
        except CheckpointError:
            raise
        except zipfile.BadZipFile:
            raise CheckpointError(
                describe_other_content(path)
                or f"{path} is truncated or damaged, or was not written by `torch.save` of PyTorch 1.6 or newer."
            ) from None
        except Exception as error:  # a damaged file can raise anything
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
        # All storages lie in one memory-mapped file: sorted by address, they match the zip members sorted by offset.
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
            raise CheckpointError(
                f"{self.path} has no averaged weights: pass `--raw_weights` to convert the raw ones."
            )
        if len(averages) != len(weights) or not all(map(_is_weight, averages)):
            raise CheckpointError(
                f"{self.path} has {len(averages)} averages for {len(weights)} weights: pass `--raw_weights` to convert the "
                "raw weights."
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
    """A tensor of a safetensors file, whose values have not been read."""

    key: str
    shape: tuple[int, ...]
    dtype: str


class HubCheckpoint(Checkpoint):
    """
    Files of `PyTorchModelHubMixin`: the averaged weights, and the configuration of the training.

    Args:
        config (`str` or `Path`): The `config.json`.
        weights (`str` or `Path`): The `model.safetensors`.
        name (`str`): Name of the checkpoint in messages.

    Raises:
        `CheckpointError`: if a file is damaged or has another type of model.
    """

    def __init__(self, config: str | Path, weights: str | Path, name: str):
        self.name, self.path = name, Path(weights)
        self.settings = self._read_settings(Path(config))
        # If the network was built inside the training code, the mixin saves the vocabulary size only.
        self.has_settings = any(type(value) is dict for value in self.settings.values())
        if "model_type" in self.settings:
            raise CheckpointError(
                f"{name} is a model of transformers ({self.settings['model_type']!r}), not a checkpoint of the published "
                "code: load it with `AutoModel.from_pretrained`."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                self.entries = {key: _Entry(key, tuple(x.get_shape()), x.get_dtype()) for key, x in slices.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: {describe_damage(self.path) or describe(error)}") from error

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
            raise CheckpointError(f"{self.name} has averaged weights only: leave out `--raw_weights`.")
        return self.tensors

    def check_size(self, weights: dict[str, _Entry]):
        pass  # safetensors rejects files that declare more than they have

    def load(self, tensor: _Entry) -> torch.Tensor:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"its type must be one of {', '.join(_DTYPES)}, got {tensor.dtype}")
        # Reopened for every tensor, and copied, because pages of an open file count as memory.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(tensor.key).to(torch.float32, copy=True)


# Types of published weights, as named by safetensors. Other types would be quantized.
_DTYPES = ("F64", "F32", "F16", "BF16")

# Maximum size of a configuration in bytes
_MAX_SETTINGS = 2**22


def download(repo_id: str, revision: str | None = None, token: str | None = None) -> HubCheckpoint:
    """
    Downloads the checkpoint in a Hub repository, or takes it from the cache.

    Args:
        repo_id (`str`): Name of the repository.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str`, *optional*): Token with read access. Defaults to the token of `hf auth login`.

    Returns:
        [`HubCheckpoint`]

    Raises:
        `CheckpointError`: if the repository, revision or file does not exist or cannot be read, or there is no connection.
    """
    name = repo_id if revision is None else f"{repo_id} at {revision}"
    paths = []
    for filename in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
        try:
            paths.append(hf_hub_download(repo_id, filename, revision=revision, token=token))
        except GatedRepoError as error:  # a subclass of `RepositoryNotFoundError`
            raise CheckpointError(
                f"{name} is gated: ask for access on its page, and log in with `hf auth login` or pass `--token`."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{repo_id} is neither on this machine nor on the Hub. If it is private, log in with `hf auth login`, or pass a "
                "`--token` with read access."
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{repo_id} has no revision {revision!r}: pass another `--revision`.") from error
        except LocalEntryNotFoundError as error:  # a subclass of `EntryNotFoundError`
            raise CheckpointError(
                f"{name}: {filename} is not in the cache, and the Hub could not be reached."
            ) from error
        except EntryNotFoundError as error:
            raise CheckpointError(
                f"{name} has no {filename}: it is not a repository of `PyTorchModelHubMixin`."
            ) from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise CheckpointError(
                    f"The Hub does not accept the token for {name}: log in with `hf auth login`, or pass another `--token`."
                ) from error
            raise CheckpointError(f"{name}: could not download {filename}. {describe(error)}") from error
        except Exception as error:  # network, disk or names
            raise CheckpointError(f"{name}: could not download {filename}. {describe(error)}") from error
    return HubCheckpoint(*paths, name)


def open_checkpoint(
    source: str | Path | Checkpoint, revision: str | None = None, token: str | None = None
) -> Checkpoint:
    """
    Opens a checkpoint: a file, a folder or a Hub repository.

    Args:
        source (`str`, `Path` or [`Checkpoint`]):
            PyTorch Lightning file, folder with `config.json` and `model.safetensors`, or name of a Hub repository. An open
            checkpoint is returned as it is.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str`, *optional*): Token with read access to the repository.

    Returns:
        [`Checkpoint`]

    Raises:
        `CheckpointError`: if it does not exist or is damaged.
    """
    if isinstance(source, Checkpoint):
        return source
    source = str(source).rstrip("/") or str(source)  # shells complete names with a slash
    path = Path(source)
    is_repository = (
        not path.exists() and source.count("/") == 1 and path.suffix not in _SUFFIXES and is_hub_name(source)
    )
    if revision == "":
        raise CheckpointError("`--revision` is empty: name a branch, tag or commit, or leave it out.")
    if revision is not None and not is_repository:
        raise CheckpointError(f"`--revision` only applies to Hub repositories, but {source} is local.")
    if path.is_dir():
        for filename in (CONFIG_NAME, SAFE_WEIGHTS_NAME):
            if not (path / filename).is_file():
                files = sorted(file.name for file in path.glob("*.ckpt"))
                hint = f" To convert {files[0]}, name the file." if files else ""
                raise CheckpointError(
                    f"{source} has no {filename}: it is not a folder of `PyTorchModelHubMixin`.{hint}"
                )
        return HubCheckpoint(path / CONFIG_NAME, path / SAFE_WEIGHTS_NAME, source)
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(f"{source}: pass the folder, which has the settings in {CONFIG_NAME}.")
    return download(source, revision, token) if is_repository else LightningCheckpoint(source)


# A missing name with one of these suffixes is a file, not a repository.
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
