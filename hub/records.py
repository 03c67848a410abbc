# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Records in a model folder: JSON files with fixed names about training, evaluation and data."""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_flm.utils_flm import as_python


TRAINING_NAME = "training.json"  # written by the trainers
EVALUATION_NAME = "evaluation.json"  # scorer, num_samples, results: [{num_steps, gen_ppl, entropy}, ...]
DATA_SETTINGS_NAME = "data_settings.json"  # written by the training scripts

ONNX_FOLDER = "onnx"

# Exported files by their precision, with the names that transformers.js expects
ONNX_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_int8.onnx"}


def to_json(value: Any, indent: int | None = None) -> str:
    """
    Formats a value as JSON, which has no NaN and no infinity: numbers that are not finite become `null`. Numbers and arrays of numpy
    become numbers and lists.
    """
    return json.dumps(_without_nan(as_python(value)), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_hub_name(name: Any) -> bool:
    """Whether `name` is a valid name of a Hub repository, and not a path on this machine."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return isinstance(name, str) and not name.startswith(".") and not Path(name).exists()


def public_name(name: str) -> str:
    """Name of a model without its path on this machine. Marks local models: a folder `gpt2` is not the model `gpt2`."""
    local = " (a local model)"
    return name if is_hub_name(name) or name.endswith(local) else Path(name).name + local


def read_records(folder: str | Path) -> dict[str, dict[str, Any]]:
    """
    Reads the records of a model, without paths of this machine.

    Args:
        folder (`str` or `Path`): Model folder.

    Returns:
        `dict[str, dict[str, Any]]`: the contents of those files among `training.json`, `evaluation.json` and
        `data_settings.json` that exist, by file name.

    Raises:
        `ValueError`: if a file is not a valid record.
    """
    cleaners = {TRAINING_NAME: _clean_training, EVALUATION_NAME: _clean_evaluation, DATA_SETTINGS_NAME: _clean_data}
    records = {}
    for name, clean in cleaners.items():
        path = Path(folder) / name
        if path.is_file():
            try:
                records[name] = clean(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is not a valid record: {type(error).__name__}: {error}") from error
    return records


def _clean_training(training: dict[str, Any]) -> dict[str, Any]:
    arguments = {str(name): value for name, value in training["arguments"].items()}
    cleaned = {"trainer": str(training["trainer"]), "step": int(training["step"]), "arguments": arguments}
    cleaned["num_devices"] = int(training.get("num_devices", 1))
    teacher, data = training.get("teacher"), training.get("data", {})
    if is_hub_name(teacher):
        cleaned["teacher"] = teacher
    if training.get("teacher_class") is not None:
        cleaned["teacher_class"] = str(training["teacher_class"])
    data = {name: kind(data[name]) for name, kind in (("source", str), ("num_examples", int)) if name in data}
    return {**cleaned, "data": data} if data else cleaned


def _clean_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    for row in evaluation["results"]:
        if not all(math.isfinite(row[name]) for name in ("num_steps", "gen_ppl", "entropy")):
            raise ValueError("`results` must have finite numbers")
    cleaned = {**evaluation, "num_samples": int(evaluation["num_samples"])}
    return {**cleaned, "scorer": public_name(str(evaluation["scorer"])), "sampling": clean_sampling(evaluation)}


def clean_sampling(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Settings of generation and scoring in an evaluation, without paths of this machine."""
    sampling = dict(evaluation.get("sampling", {}))
    return {name: public_name(value) if name == "guidance_model" else value for name, value in sampling.items()}


def _clean_data(settings: dict[str, Any]) -> dict[str, Any]:
    def is_public(name: str, value: Any) -> bool:
        if name == "dataset_name":
            return is_hub_name(value)
        return name == "dataset_revision" or not (isinstance(value, str) and re.search(r"[/\\]", value))

    local = ("train_file", "validation_file")
    return {name: value for name, value in settings.items() if name not in local and is_public(name, value)}
