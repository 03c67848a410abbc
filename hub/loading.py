# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Loading of models, tokenizers and configurations, with errors that name what is wrong."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.utils_flm import check_finite, describe_damage


def describe_mismatch(name: str | Path, info: dict[str, Any]) -> str | None:
    """Returns which weights a loaded model lacks or does not have, judging by `output_loading_info`, or `None`."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(problem, []))):
            listed = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            return f"The weights in {name} do not match its configuration, {problem.replace('_', ' ')}: {listed}"
    return None


def find_damage(name: str | Path) -> str | None:
    """Returns what is wrong with a JSON or safetensors file in a folder, and what to do, or `None`."""
    paths = [path for pattern in ("*.json", "*.safetensors") for path in sorted(Path(name).glob(pattern))]
    return next(filter(None, map(describe_damage, paths)), None)


def load_checked(auto_class: type, name: str | Path, **options) -> Any:
    """
    Loads a model, tokenizer or configuration.

    Args:
        auto_class (`type`): The class to load it with, such as [`~transformers.AutoModel`].
        name (`str` or `Path`): A name on the Hub, or a folder.
        options: Arguments of `from_pretrained`.

    Raises:
        `OSError`: if it cannot be found or read, if a model lacks weights or a flow-based one has others than its configuration says, if
            its folder has a tokenizer with more tokens, if weights are NaN or infinite, or if a folder is to have a `revision`.
    """
    if options.get("revision") == "":
        raise OSError("the revision is empty: name a branch, tag or commit, or leave it out.")
    if options.get("revision") not in (None, "main") and Path(name).is_dir():
        raise OSError(f"{name} is a folder, which has no revision {options['revision']!r}: leave out the revision.")
    is_model = hasattr(auto_class, "from_config")
    try:
        loaded = auto_class.from_pretrained(name, **options, **({"output_loading_info": True} if is_model else {}))
    except (OSError, ImportError) as error:
        if (damage := find_damage(name)) is not None:
            raise OSError(damage) from error
        if isinstance(error, ImportError) or str(name) in str(error):
            raise
        raise OSError(f"{name} cannot be loaded: {error}") from error
    except Exception as error:  # of any file
        cause = " ".join(str(error).split()).rstrip(".")
        if "ignore_mismatched_sizes" in cause:
            cause = "its weights have other sizes than its config.json"
        elif auto_class is AutoTokenizer and "backend tokenizer" in cause:
            cause = "it has no tokenizer.json, or a package that its tokenizer needs is missing"
        message = (
            find_damage(name)
            or f"{name} cannot be loaded: {cause or type(error).__name__}. Download or copy it again."
        )
        raise OSError(message) from error
    if is_model:
        loaded, info = loaded
        if loaded.config.model_type not in FLOW_MODEL_TYPES:  # models often ignore weights, for example of other heads
            info = {"missing_keys": info["missing_keys"]}
        if (problem := describe_mismatch(name, info)) is not None:
            raise OSError(problem)
    if isinstance(loaded, PreTrainedModel):
        try:
            check_finite("the model", loaded)
        except ValueError as error:
            raise OSError(str(error)) from None
    config_file = Path(name, CONFIG_NAME)
    if auto_class is AutoTokenizer and config_file.is_file():
        config = json.loads(config_file.read_bytes())
        if config.get("model_type") in FLOW_MODEL_TYPES and len(loaded) > config.get("vocab_size", 0):
            raise OSError(
                f"the tokenizer in {name} has {len(loaded)} tokens, but the model has {config.get('vocab_size')}: it belongs to another model."
            )
    return loaded
