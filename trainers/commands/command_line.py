# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines: arguments from flags and YAML files, one-line errors, and checks of what was passed."""

import argparse
import difflib
import json
import re
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments
from transformers.hf_argparser import string_to_bool

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES


_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"

# A setting of a YAML file without a value
_EMPTY = "\0"


def float_or_none(text: str) -> float | None:
    """A float, or `None` for "none" or "null"."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or none, got {text!r}") from error


class UniqueKeyLoader(yaml.SafeLoader):
    """Loads YAML as `yaml.SafeLoader` does, but refuses keys that are there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines = {}
        for key, _ in node.value:
            if key.tag != _MERGE and key.value in lines:
                where = f"lines {lines[key.value]} and {key.start_mark.line + 1}"
                raise ValueError(f"{key.value} is there twice, in {where}.")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _TextLoader(UniqueKeyLoader):
    """Loads scalars as they stand, for the flags to convert: YAML would read `no` as false, 010 as 8 and 1:30 as 90."""

    yaml_implicit_resolvers = {
        start: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _MERGE)]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_null(self, node: yaml.ScalarNode) -> str | None:
        return _EMPTY if node.value == "" else None


_TextLoader.add_constructor(_NULL, _TextLoader.construct_yaml_null)
_TextLoader.add_implicit_resolver(_NULL, re.compile("None$"), "N")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, and shows defaults other than `None`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class ScriptParser(HfArgumentParser):
    """
    Parser of dataclasses. Values come from flags, else from a YAML file (the first argument), else from defaults.

    `--help` leaves out the flags that are inherited from [`~transformers.TrainingArguments`].

    Args:
        dataclass_types (`list[type]`): The dataclasses.
        find_defaults (`Callable`, *optional*):
            Called with the namespace of all chosen arguments and the settings of the YAML file. Returns the settings to use,
            such as a preset updated by the settings of the file.
        positional (`str`, *optional*): Name of the flag that may be left out before the first argument.
        kwargs: Arguments of [`~transformers.HfArgumentParser`], such as a `description`.
    """

    def __init__(
        self,
        dataclass_types: list[type],
        find_defaults: Callable[[Namespace, dict[str, Any]], dict[str, Any]] | None = None,
        positional: str | None = None,
        **kwargs,
    ):
        kwargs = {"usage": "%(prog)s [CONFIG.yaml] [--flag VALUE ...]", "formatter_class": _HelpFormatter, **kwargs}
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.find_defaults, self.positional = find_defaults, positional
        hints = [hint for each in dataclass_types for hint in get_type_hints(each).items()]
        optional = {name for name, hint in hints if NoneType in get_args(hint)}
        inherited = {each for one in dataclass_types for each in fields(one)} & {*fields(TrainingArguments)}
        inherited_names = {each.name for each in inherited}
        for action in self._actions:
            if action.type is float and action.dest in optional:
                action.type = float_or_none
            if action.dest in inherited_names:
                action.help = argparse.SUPPRESS
        if inherited:
            self.epilog = "All flags of transformers.TrainingArguments are accepted as well, such as --output_dir."

    def parse_args_and_config(self, arguments: list[str] | None = None) -> tuple:
        """
        Parses the command line.

        Args:
            arguments (`list[str]`, *optional*): The command line. Defaults to `sys.argv`.

        Returns:
            `tuple`: an object of each dataclass.
        """
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        settings = {}
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            settings = self._read_yaml(arguments.pop(0))
        if self.positional is not None and arguments and not arguments[0].startswith("-"):
            arguments.insert(0, f"--{self.positional}")
        try:
            chosen = self._parse(settings, arguments)
            if self.find_defaults is not None:
                settings = self.find_defaults(chosen, settings)
                self._parse(settings, arguments)
            return self.parse_args_into_dataclasses(self._to_flags(settings) + arguments, look_for_args_file=False)
        except ValueError as error:
            self.error(with_flags(str(error), self.dataclass_types))

    def _read_yaml(self, path: str) -> dict[str, Any]:
        try:
            text = Path(path).read_text(encoding="utf-8")
            settings, typed = yaml.load(text, _TextLoader), yaml.load(text, UniqueKeyLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"{path} cannot be read: {error}")
        if not isinstance(settings, dict | None):
            self.error(f"{path} must have settings such as `max_steps: 1000`, got {settings!r:.80}")
        settings = settings or {}
        names = {}
        for name in settings:  # a flag may have several
            flag = self._option_string_actions.get(f"--{name}", name)
            if flag in names:
                self.error(f"{path}: {names[flag]} and {name} are the same setting; leave one out.")
            names[flag] = name
        for (name, value), content in zip(settings.items(), (typed or {}).values(), strict=True):
            if value == _EMPTY:
                self.error(f"{path}: {name} has no value; leave out the line, or write `{name}: null` for none.")
            if isinstance(value, dict):
                settings[name] = content
        return settings

    def _to_flags(self, settings: dict[str, Any]) -> list[str]:
        """Settings as flags, so that both are checked alike. `None` is the default where a flag has no such value."""
        types = {action.dest: action.type for action in self._actions}
        flags = []
        for name, value in settings.items():
            type_of_flag = types.get(name.replace("-", "_"))
            if type_of_flag is string_to_bool and isinstance(value, str):
                value = {"on": "true", "off": "false"}.get(value.lower(), value)
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None or type_of_flag is float_or_none:
                flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return flags

    def _parse(self, settings: dict[str, Any], arguments: list[str]) -> Namespace:
        """The namespace of settings and flags. Unknown ones are an error."""
        namespace, unknown = self.parse_known_args(self._to_flags(settings) + arguments)
        names = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown  # without their values
        for number, name in enumerate(names):
            if close := difflib.get_close_matches(name, self._option_string_actions, n=1):
                names[number] = f"{name} (did you mean {close[0]}?)"
            elif name.endswith((".yaml", ".yml")):
                names[number] = f"{name} (must come before the flags)"
        if names:
            self.error(f"unknown arguments {', '.join(names)}")
        return namespace

    def error(self, message: str):
        raise SystemExit(f"error: {' '.join(message.split())}")


def with_flags(message: str, dataclass_types: Iterable[type] = (), names: Iterable[str] = ()) -> str:
    """One-line message with argument names in backticks replaced by flags."""
    names = "|".join([*names, *(each.name for one in dataclass_types for each in fields(one))])
    return re.sub(rf"`({names})(=[^`(]*)?`", r"--\1\2", " ".join(message.split()))


@contextmanager
def friendly_errors(*dataclass_types: type, flags: Iterable[str] = ()) -> Iterator[None]:
    """
    Ends a command with one line for a `ValueError` or `OSError` about its flags, which has the name of one in backticks, as
    all checks of this library do. Any other error keeps its traceback.

    Args:
        dataclass_types (`type`): The dataclasses of the flags.
        flags (`Iterable[str]`, *optional*): Names of further flags.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        message = with_flags(str(error), dataclass_types, flags)
        if message == with_flags(str(error)):
            raise
        raise SystemExit(f"error: {message}") from error


@contextmanager
def errors_about(name: str, *error_types: type[Exception]) -> Iterator[None]:
    """
    Converts other libraries' errors about an argument's value to a `ValueError` that names the argument.

    Args:
        name (`str`): The argument, such as `"model"`.
        error_types (`type`): The exceptions that a wrong value raises.
    """
    try:
        yield
    except error_types as error:
        raise ValueError(f"`{name}`: {error}") from error
    except SafetensorError as error:  # models of this library name the file
        raise ValueError(f"`{name}`: its weights are truncated or damaged; download or copy them again.") from error


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within this context SIGTERM, which launchers and schedulers send to end a process, raises `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_model(name: str, value: str):
    """
    Checks that a path to a folder exists.

    Args:
        name (`str`): The argument for a model, a tokenizer or a dataset, such as `"model"`.
        value (`str`): A name on the Hub, or a folder.

    Raises:
        `ValueError`: if `value` looks like a path but is not a directory.
    """
    is_path = value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value
    if is_path and not Path(value).is_dir():
        raise ValueError(f"`{name}`: there is no folder {value}.")


def check_model_type(
    name: str, model: PreTrainedModel, hint: str = "", model_types: tuple[str, ...] = FLOW_MODEL_TYPES
):
    """
    Checks the type of a model.

    Args:
        name (`str`): The argument that names the model, such as `"model"`.
        model ([`~transformers.PreTrainedModel`]): The model.
        hint (`str`, *optional*): What to do instead, after a space.
        model_types (`tuple[str, ...]`, *optional*): The accepted types. By default all model types of this library.

    Raises:
        `ValueError`: if the model has another type.
    """
    if model.config.model_type not in model_types:
        wanted = {("flm",): "an FLM", ("fmlm",): "a flow map"}.get(model_types, "an FLM or a flow map")
        raise ValueError(f"`{name}` must be {wanted}, got a {type(model).__name__}.{hint}")


def check_device(name: str, value: str | None):
    """
    Checks that a device is available.

    Args:
        name (`str`): The argument that names the device, such as `"device"`.
        value (`str`, *optional*): The device, such as `"cuda"` or `"cuda:1"`.

    Raises:
        `ValueError`: if there is no such device.
    """
    if value is None:
        return
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"`{name}` must be a device such as cpu, cuda or cuda:1, got {value}.") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    num_devices = 0 if accelerator is None else torch.accelerator.device_count()
    available = ["cpu", *(f"{accelerator.type}:{index}" for index in range(num_devices))]
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in available:
        raise ValueError(f"`{name}`: {value} is not available. Available devices: {', '.join(available)}.")
