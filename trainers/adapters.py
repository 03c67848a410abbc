# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft: models that are wrapped into a `PeftModel`, and those that `add_adapter` has changed."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, is_peft_available


# What peft puts before the names of a model's weights
_PREFIX = "base_model.model."


def network_of(model: nn.Module) -> nn.Module:
    """
    The model within a `PeftModel`, whose layers have the adapters; any other model itself.

    Raises:
        `ValueError`: where peft changes the inputs of `forward` and not the layers, which no method but `forward` would see.
    """
    if not is_peft_available():
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"`model` has an adapter of type {kind}, which adds virtual tokens: take one that adapts layers, such as LoRA."
        )
    return model.get_base_model()


def has_added_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters of `model.add_adapter` or `model.load_adapter`, with which alone it is saved."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def load_added_adapters(model: PreTrainedModel, folder: str | Path):
    """Loads the weights of the active adapter from a folder that the model was saved to, which `Trainer` does not."""
    from peft import set_peft_model_state_dict

    weights = load_file(Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME)
    weights = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    (name,) = model.active_adapters()
    set_peft_model_state_dict(model, weights, name)
