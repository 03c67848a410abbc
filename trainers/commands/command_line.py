# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What command lines share: arguments from flags and YAML files, errors in a line, and checks of what was passed."""

import argparse
import difflib
import re
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments
from transformers.hf_argparser import string_to_bool

from modeling_flm import FLMConfig
from modeling_flm.configuration_flm import FLOW_MODEL_TYPES


def optional_number(text: str) -> float | None:
    """A number, or `None` where it is said so."""
    return None if text.lower() in ("none", "null") else float(text)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a description as it is written, and the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


class ScriptParser(HfArgumentParser):
    """
    A parser of dataclasses, whose values come from flags, over a YAML file, over defaults that follow from both.

    `--help` leaves out the flags of `TrainingArguments`, which `--help-all` shows as well.

    Args:
        dataclass_types (`list[type]`): The dataclasses.
        find_defaults (`Callable`, *optional*): Makes further defaults of the arguments that were chosen, as a namespace.
        kwargs: Arguments of [`~transformers.HfArgumentParser`], such as a `description`.
    """

    def __init__(
        self, dataclass_types: list[type], find_defaults: Callable[[Namespace], dict] | None = None, **kwargs
    ):
        kwargs = {"usage": "%(prog)s [CONFIG.yaml] [--flag VALUE ...]", "formatter_class": _HelpFormatter, **kwargs}
        kwargs.setdefault("allow_abbrev", False)  # a flag that is cut short may be another one
        super().__init__(dataclass_types, **kwargs)
        self.find_defaults = find_defaults
        for action in self._actions:
            if action.dest == "resume_from_checkpoint":  # also without a value
                action.nargs, action.const = "?", "true"
            if action.dest == "ema_decay":
                action.type = optional_number
        if any(issubclass(dataclass_type, TrainingArguments) for dataclass_type in dataclass_types):
            self.add_argument(
                "--help-all", action=_HelpAll, help="show the flags of TrainingArguments as well, and exit"
            )

    def format_help(self, everything: bool = False) -> str:
        inherited = set() if everything else {definition.name for definition in fields(TrainingArguments)}
        inherited -= {"output_dir", "help"}
        hidden = [action for action in self._actions if action.dest in inherited]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts):
                action.help = text

    def parse_args_and_config(self, arguments: list[str] | None = None) -> tuple:
        """
        Reads the command line, on which a YAML file may come first.

        Args:
            arguments (`list[str]`, *optional*): What to read instead of the command line.

        Returns:
            `tuple`: an object of each dataclass.
        """
        with explained(*self.dataclass_types):
            return self._parse_args_and_config(list(sys.argv[1:] if arguments is None else arguments))

    def _parse_args_and_config(self, arguments: list[str]) -> tuple:
        settings = {}
        if arguments and arguments[0].endswith((".yaml", ".yml")):
            source = arguments.pop(0)
            settings = self._read_yaml(source)
            if any(argument.split("=")[0] == "--train_file" for argument in arguments):
                # A file on the command line stands in for the dataset of the recipe.
                dataset = (
                    "dataset_name",
                    "dataset_config_name",
                    "dataset_revision",
                    "train_split",
                    "validation_split",
                )
                settings = {name: value for name, value in settings.items() if name not in dataset}
            self._change_defaults(settings, source)
        if arguments and not arguments[0].startswith("-") and any(action.dest == "model" for action in self._actions):
            arguments.insert(0, "--model")
        known, unknown = self.parse_known_args(arguments)
        if files := [argument for argument in unknown if argument.endswith((".yaml", ".yml"))]:
            raise ValueError(f"{files[0]} must come before the flags")
        if unknown:
            unknown = [name for name in unknown if name.startswith("--")] or unknown  # without their values
            raise ValueError(f"unknown arguments {', '.join(map(self._suggest, unknown))}")
        if getattr(known, "output_dir", "") is None:  # transformers would write to `trainer_output`
            raise ValueError("`output_dir` is missing: name the folder to write to.")
        if self.find_defaults is not None:
            chosen = self.parse_args(arguments)
            self._change_defaults({**self.find_defaults(chosen), **settings}, "defaults")
        return self.parse_args_into_dataclasses(arguments)

    @staticmethod
    def _read_yaml(source: str) -> dict:
        with open(source, encoding="utf-8") as file:
            try:
                settings = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
        if settings is not None and not isinstance(settings, dict):
            raise ValueError(f"{source} must have settings such as `max_steps: 1000`, got {settings!r:.80}")
        return settings or {}

    def _suggest(self, name: str) -> str:
        """An unknown flag or setting, and which may have been meant."""
        known = [action.dest for action in self._actions]
        if "config_overrides" in known and hasattr(FLMConfig(), name.lstrip("-").split("=")[0]):
            return f"{name} (part of --config_overrides)"
        close = difflib.get_close_matches(name.lstrip("-").split("=")[0], known, n=1)
        prefix = "--" if name.startswith("-") else ""
        return f"{name} (did you mean {prefix}{close[0]}?)" if close else name

    @staticmethod
    def _check_type(action: argparse.Action, value: Any, source: str):
        """Ends the script for a value of another type, as argparse, which only looks at texts, would on the command line."""
        kinds = {int: "an integer", float: "a number", optional_number: "a number", string_to_bool: "true or false"}
        if value is None or action.type not in kinds:
            return
        is_list = isinstance(value, list)
        try:
            if is_list and action.nargs not in ("+", "*"):
                raise TypeError
            for each in value if is_list else [value]:
                action.type(str(each))
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise SystemExit(f"{source}: {action.dest} must be {kinds[action.type]}, got {value!r}") from error

    def _change_defaults(self, defaults: dict, source: str):
        known = {action.dest: action for action in self._actions}
        if unknown := sorted(defaults.keys() - known.keys()):
            raise SystemExit(f"{source}: unknown settings {', '.join(map(self._suggest, unknown))}")
        for name, value in defaults.items():
            action = known[name]
            action.required = False
            if action.nargs in ("+", "*") and not isinstance(value, list):
                defaults[name] = [value]
            values = value if isinstance(value, list) else [] if value is None else [value]
            self._check_type(action, value, source)
            if action.choices is not None and any(each not in action.choices for each in values):
                raise SystemExit(
                    f"{source}: {name} must be one of {', '.join(map(str, action.choices))}, got {value!r}"
                )
        self.set_defaults(**defaults)


@contextmanager
def explained(*dataclass_types: type, flags: Iterable[str] = ()) -> Iterator[None]:
    """Turns errors about these flags and dataclasses, and of names that do not exist, into a line about flags."""
    flags = "|".join([*flags, *(definition.name for each in dataclass_types for definition in fields(each))])
    try:
        yield
    # Of packages that an attention needs, and of configurations
    except (OSError, ValueError, ImportError, StrictDataclassError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise SystemExit("error: " + re.sub(rf"`({flags})(=[^`(]*)?`", r"--\1\2", message)) from error


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within this context SIGTERM, by which launchers and schedulers end a process, is a `KeyboardInterrupt`, as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_model(flag: str, name: str):
    """
    Raises a `ValueError` for what can only be a folder and is none.

    Args:
        flag (`str`): The flag that names a model, a tokenizer or a dataset.
        name (`str`): A name on the Hub, or a folder.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path and not Path(name).is_dir():
        raise ValueError(f"{flag}: there is no folder {name}.")


def check_kind(flag: str, model: PreTrainedModel, hint: str = "", model_types: tuple[str, ...] = FLOW_MODEL_TYPES):
    """
    Raises a `ValueError` for a model of another kind.

    Args:
        flag (`str`): The flag that names it.
        model ([`~transformers.PreTrainedModel`]): What was loaded.
        hint (`str`, *optional*): What else to do.
        model_types (`tuple[str, ...]`, *optional*): The kinds that it may be of. By default all of this library.
    """
    if model.config.model_type not in model_types:
        wanted = {("flm",): "an FLM", ("fmlm",): "a flow map"}.get(model_types, "an FLM or a flow map")
        raise ValueError(f"{flag}: it must name {wanted}, and is a {type(model).__name__}.{hint}")


def check_device(flag: str, name: str | None):
    """
    Raises a `ValueError` for a device that is not there.

    Args:
        flag (`str`): The flag that names it.
        name (`str`, *optional*): Such as `"cuda"` or `"cuda:1"`.
    """
    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{flag}: {name} is no device; pass cpu, cuda or cuda:1, for example.") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = (
        []
        if accelerator is None
        else [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    )
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in there:
        raise ValueError(
            f"{flag}: {name} is not here, but {', '.join(['cpu', *there])}; pass one of them, or leave it out."
        )
