# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Training in several processes: wrappers of a model, FSDP2, and the state that accelerate shares within a process.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from transformers import PreTrainedModel

from modeling_flm import FLMModel


# Options for state dictionaries with whole weights, gathered if they are sharded
_WHOLE = {"full_state_dict": True, "cpu_offload": True}


def through_forward(wrapper: nn.Module, model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    """
    Calls a function that uses any methods of the model as if it were the model's `forward`, so that DDP synchronizes gradients
    and FSDP gathers the weights.

    Args:
        wrapper (`nn.Module`): The wrapper of the model, or the model itself.
        model ([`~transformers.PreTrainedModel`]): The model.
        function (`Callable[[], Any]`): The function.

    Returns:
        The result of the function.
    """
    _gather_heads_for_losses(model)
    before = model.__dict__.get("forward")  # accelerate's autocast, if any

    def restore():
        if before is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = before

    def redirected() -> Any:
        restore()
        return function()

    model.forward = redirected
    try:
        return wrapper()
    finally:
        restore()


def _gather_heads_for_losses(model: nn.Module):
    """Makes FSDP gather the weights of a sharded head for `head_loss` of its model, as it does for the head's `forward`."""
    if not is_sharded(model):  # the root is sharded whenever a head is: no walk over the modules at every other step
        return
    for network in model.modules():
        if isinstance(network, FLMModel) and is_sharded(network.lm_head) and "loss" not in vars(network.lm_head):
            network.lm_head.loss = network.head_loss
            register_fsdp_forward_method(network.lm_head, "loss")
            network.head_loss = network.lm_head.loss


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the weights, so that all processes must take part in every use of the model."""
    return isinstance(model, FSDPModule)


def check_support(name: str, accelerator: Accelerator, is_deepspeed: bool, is_fsdp: bool):
    """Raises a `ValueError` for a kind of distributed training that the trainer called `name` does not support."""
    if is_deepspeed or (is_fsdp and not accelerator.is_fsdp2):
        raise ValueError(f"`{name}` supports only DDP and FSDP2 (`fsdp_version: 2`).")
    if is_fsdp and "FULL" not in str(accelerator.state.fsdp_plugin.state_dict_type):
        raise ValueError(
            "Sharded checkpoints are not supported: set `fsdp_state_dict_type: FULL_STATE_DICT` in the configuration of "
            "accelerate."
        )


@contextmanager
def without_mixed_precision(accelerator: Accelerator) -> Iterator[None]:
    """
    Context in which accelerate prepares a model without FSDP's mixed precision and without compiling it. Blocks run under
    autocast, and FSDP's mixed precision would round the times. Trainers compile regions of the model instead, because a step
    uses more than the model's `forward`.
    """
    state = accelerator.state
    plugin, dynamo = getattr(state, "fsdp_plugin", None), state.dynamo_plugin
    policy = None if plugin is None else plugin.mixed_precision_policy
    state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)
    if plugin is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    try:
        yield
    finally:
        state.dynamo_plugin = dynamo
        if plugin is not None:
            plugin.mixed_precision_policy = policy


def region_options(backend: str | None, mode: str | None) -> dict[str, Any] | None:
    """Arguments of `torch.compile` from the training arguments or `accelerate launch`; `None` for no compilation."""
    plugin = TorchDynamoPlugin(backend=backend, mode=mode)
    if plugin.backend == DynamoBackend.NO:
        return None
    options = plugin.to_kwargs()
    names = ("backend", "mode", "dynamic", "options")
    return {name: options[name] for name in names if options.get(name) is not None}


def trained_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all trained weights on the CPU. If they are sharded, all processes must call this."""
    if is_sharded(model):
        return get_model_state_dict(model, options=StateDictOptions(**_WHOLE, ignore_frozen_params=True))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().cpu() for name, parameter in trained.items()}


def load_whole_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]):
    """Loads whole weights into a model that may be sharded. Weights missing in `state_dict` stay unchanged."""
    if is_sharded(model):
        result = set_model_state_dict(model, state_dict, options=StateDictOptions(**_WHOLE, strict=False))
    else:
        result = model.load_state_dict(state_dict, strict=False)
    if result.unexpected_keys:
        raise ValueError(
            f"The checkpoint has weights that do not belong to the model: {', '.join(result.unexpected_keys)}."
        )


def copy_of_weights(model: nn.Module) -> nn.Module:
    """
    Returns a copy of the model to average weights in, which shares frozen weights with it. For a sharded model, returns only
    the shards of this process.
    """
    if not is_sharded(model):
        return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    return nn.ParameterList(nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters())


def forget_gathered_weights(model: nn.Module):
    """Frees weights that FSDP has gathered. Call it after a change of sharded weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def restore_class_name(model: PreTrainedModel):
    """Restores the name of the model's class, which FSDP replaces by a derived one, so that the right code is saved."""
    if is_sharded(model):
        derived, original = type(model), type(model).__bases__[-1]
        derived.__module__, derived.__name__ = original.__module__, original.__name__
