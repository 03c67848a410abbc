# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft, in a `PeftModel` or added by `model.add_adapter`."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, is_peft_available


# Prefix of the names of weights in a `PeftModel`
_PREFIX = "base_model.model."


def unwrap_model(model: nn.Module) -> nn.Module:
    """
    Returns the model within a `PeftModel`, whose layers have the adapters, or any other model itself.

    Raises:
        `ValueError`: for adapters that change the inputs of `forward` instead of layers, because training calls other methods.
    """
    if not is_peft_available():
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        peft_type = model.active_peft_config.peft_type.value
        raise ValueError(
            f"`model` has an adapter of type {peft_type}, which adds virtual tokens: use one that adapts layers, such as LoRA."
        )
    return model.get_base_model()


def has_added_adapters(model: nn.Module) -> bool:
    """Returns whether a model has adapters from `model.add_adapter` or `model.load_adapter`. It then saves only these."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def load_added_adapters(model: PreTrainedModel, folder: str | Path):
    """Loads the weights of the active adapter from a saved model, which `Trainer` does not do."""
    from peft import set_peft_model_state_dict

    weights = load_file(Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME)
    weights = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    (name,) = model.active_adapters()
    set_peft_model_state_dict(model, weights, name)
