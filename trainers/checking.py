# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments and models of trainers, before anything is trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_flm import FMLMModel, utils_flm

from .adapters import unwrap_model
from .flm_config import FLMTrainingArguments


def check_arguments(
    trainer: str,
    args: FLMTrainingArguments,
    processing_class: PreTrainedTokenizerBase | None = None,
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    compute_loss_func: Callable | None = None,
):
    """Raises a `ValueError` for arguments that have no effect on a trainer, or that lack another argument."""
    for name in ("sample_steps", "eval_gen_ppl_steps"):
        if getattr(args, name) > 0 and processing_class is None:
            raise ValueError(f"`{name}` needs a tokenizer to decode samples with: pass `processing_class`.")
    ignored = {
        "label_smoothing_factor": args.label_smoothing_factor,
        "neftune_noise_alpha": args.neftune_noise_alpha,
        "compute_loss_func": compute_loss_func,
    }
    for name, value in ignored.items():
        if value:
            raise ValueError(f"`{name}` has no effect on `{trainer}`, which has its own loss: leave it out.")
    if args.n_gpu > 1:
        raise ValueError(f"`{trainer}` needs one process per device: start the script with `accelerate launch`.")
    if getattr(data_collator, "mlm", False):
        raise ValueError(
            "`data_collator` masks tokens for masked language modeling: leave it out, or pass `mlm=False`. A flow has its noise "
            "in the states, and needs clean tokens."
        )


def check_model(
    trainer: str,
    model: PreTrainedModel | nn.Module,
    model_classes: tuple[type[PreTrainedModel], ...],
    args: FLMTrainingArguments,
    processing_class: PreTrainedTokenizerBase | None = None,
):
    """Raises a `TypeError` or `ValueError` if a trainer cannot train a model with its arguments and tokenizer."""
    network = unwrap_model(model)
    if isinstance(network, FMLMModel) and FMLMModel not in model_classes:
        raise TypeError(f"`model` is a flow map, `{type(network).__name__}`: train it with `FMLMTrainer`.")
    if not isinstance(network, model_classes):
        names = " or ".join(f"`{model_class.__name__}`" for model_class in model_classes)
        raise TypeError(f"`model` must be a {names} for `{trainer}`, got `{type(network).__name__}`.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "`model` has no weights to train. `FMLMTrainer` freezes the weights of a teacher: call `model.requires_grad_(True)`. "
            "Load adapters with `is_trainable=True`."
        )
    if processing_class is not None and len(processing_class) > model.config.vocab_size:
        raise ValueError(
            f"`processing_class` has {len(processing_class)} tokens, but the model's `vocab_size` is {model.config.vocab_size}. "
            "Build the model with `vocab_size=len(tokenizer)`."
        )
    if args.prompt_dropout > 0 and not args.has_prompts:
        raise ValueError("`prompt_dropout` needs prompts: pass `prompt_fraction` or `prompts_from_labels`.")
    if args.prompt_dropout > 0 and model.config.pad_token_id is None:
        raise ValueError("`prompt_dropout` replaces prompts by padding: it needs a model with a `pad_token_id`.")
    if args.ema_decay is not None and any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(
            f"`model` has weights in {model.dtype}, in which small steps of their moving average round away: load it with "
            "`dtype=torch.float32`, and pass `bf16=True` to train in mixed precision."
        )


def check_finite(*networks: PreTrainedModel):
    """Raises a `ValueError` if the trained model, the first, or another network has weights that are NaN or infinite."""
    for network in networks:
        utils_flm.check_finite("`model`" if network is networks[0] else "`teacher`", network)
