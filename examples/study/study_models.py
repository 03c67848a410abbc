# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The models that `study.py` compares: how each is made, trained, sampled and measured."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peers.autoregressive import (
    AutoregressiveTrainer,
    autoregressive_log_likelihood,
    autoregressive_samples,
    new_gpt2,
)
from peers.masked_diffusion import (
    MaskedDiffusionTrainer,
    ancestral_samples,
    masked_log_likelihood,
    new_masked_model,
)
from peers.uniform_diffusion import UniformDiffusionTrainer, uniform_log_likelihood, uniform_samples
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from modeling_flm import FLMConfig, FLMModel, FMLMModel
from modeling_flm.trainers import (
    DataCollatorForFLM,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
)


# A short distillation should often see the whole way, which one step takes.
BOUNDARY_PROBABILITY = 0.25


@dataclass
class Contender:
    """
    A model to compare.

    Args:
        new_trainer (`Callable`):
            From a configuration, settings of the training, the decay of the moving average, the texts, the tokenizer, the teacher, if
            there is one, and the share of the texts with known tokens, which flows need to be trained for, to the trainer of a new
            model.
        load (`Callable`): From a folder to the model.
        sample (`Callable`):
            From the model, a number of texts, their length, a number of steps, a temperature and a generator to tokens.
        log_likelihood (`Callable`):
            From the model, texts, how often each is noised, and a generator to their log-likelihoods or lower bounds, in nats.
        teacher (`str`, *optional*): The model that it is distilled from.
        searched_as (`str`, *optional*): The model whose learning rate it has, if none was searched for it.
        sampler (`str`, *optional*, defaults to `"steps"`):
            `"steps"` if any number of forward passes will do, `"one pass a token"` if it is the number of tokens.
        has_temperature (`Callable`, *optional*): Whether a temperature changes what so many steps write. By default always.
    """

    new_trainer: Callable[..., Trainer]
    load: Callable[[Path], PreTrainedModel]
    sample: Callable[..., torch.LongTensor]
    log_likelihood: Callable[..., torch.Tensor]
    teacher: str | None = None
    searched_as: str | None = None
    sampler: str = "steps"
    has_temperature: Callable[[int], bool] = field(default=lambda num_steps: True)


def new_peer_trainer(
    new_model: Callable,
    trainer_class: type,
    config: FLMConfig,
    settings: dict,
    ema_decay: float,
    datasets,
    tokenizer,
    *_,
) -> Trainer:
    """The trainer of a model that is no flow."""
    return trainer_class(
        new_model(config),
        TrainingArguments(**settings, remove_unused_columns=False),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        data_collator=DataCollatorForFLM(tokenizer.pad_token_id),
        processing_class=tokenizer,
        ema_decay=ema_decay,
    )


def new_flow_trainer(
    options: dict, config: FLMConfig, settings: dict, ema_decay: float, datasets, tokenizer, _, prompt_fraction: float
) -> FLMTrainer:
    """The trainer of an FLM, with further `options` of its configuration."""
    return FLMTrainer(
        FLMModel(FLMConfig(**{**config.to_dict(), **options})),
        FLMTrainingArguments(**settings, ema_decay=ema_decay, prompt_fraction=prompt_fraction),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
    )


def new_flow_map_trainer(
    config: FLMConfig,
    settings: dict,
    ema_decay: float,
    datasets: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    teacher: FLMModel,
    prompt_fraction: float,
) -> FMLMTrainer:
    """The trainer of an FMLM."""
    return FMLMTrainer(
        FMLMModel.from_flm(teacher),
        FMLMTrainingArguments.from_preset(
            "single_stage",
            **settings,
            ema_decay=ema_decay,
            boundary_probability=BOUNDARY_PROBABILITY,
            prompt_fraction=prompt_fraction,
        ),
        teacher=teacher,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        processing_class=tokenizer,
    )


def flow_samples(
    model: FLMModel, num_samples: int, length: int, num_steps: int, temperature: float, generator: torch.Generator
) -> torch.LongTensor:
    """Texts of an FLM or a flow map."""
    return model.generate(
        num_samples=num_samples,
        length=length,
        num_steps=num_steps,
        temperature=temperature,
        batch_size=num_samples,
        generator=generator,
    )


def flow_log_likelihood(
    model: FLMModel, input_ids: torch.LongTensor, num_times: int, generator: torch.Generator
) -> torch.Tensor:
    """The bound of an FLM or a flow map."""
    return model.log_likelihood_bound(input_ids, num_times=num_times, generator=generator).log_likelihood


def _flow(**options) -> Contender:
    return Contender(
        new_trainer=partial(new_flow_trainer, options),
        load=FLMModel.from_pretrained,
        sample=flow_samples,
        log_likelihood=flow_log_likelihood,
        searched_as="flm" if options else None,
        has_temperature=lambda num_steps: num_steps > 1,  # one step takes the likeliest tokens
    )


def _flow_map(teacher: str) -> Contender:
    return Contender(
        new_trainer=new_flow_map_trainer,
        load=FMLMModel.from_pretrained,
        sample=flow_samples,
        log_likelihood=flow_log_likelihood,
        teacher=teacher,
        searched_as="flm",
        has_temperature=lambda num_steps: num_steps > 1,
    )


def new_masked_study_model(config: FLMConfig) -> FLMModel:
    """A masked model that knows where texts begin if they have an end, and are no blocks of a longer one."""
    return new_masked_model(config, with_places=config.eos_token_id is not None)


CONTENDERS = {
    "gpt2": Contender(
        new_trainer=partial(new_peer_trainer, new_gpt2, AutoregressiveTrainer),
        load=GPT2LMHeadModel.from_pretrained,
        sample=lambda model, num_samples, length, num_steps, temperature, generator: autoregressive_samples(
            model, num_samples, length, temperature, generator
        ),
        log_likelihood=lambda model, input_ids, num_times, generator: autoregressive_log_likelihood(model, input_ids),
        sampler="one pass a token",
    ),
    "mdlm": Contender(
        new_trainer=partial(new_peer_trainer, new_masked_study_model, MaskedDiffusionTrainer),
        load=FLMModel.from_pretrained,
        sample=ancestral_samples,
        log_likelihood=masked_log_likelihood,
    ),
    "duo": Contender(
        new_trainer=partial(new_peer_trainer, FLMModel, UniformDiffusionTrainer),
        load=FLMModel.from_pretrained,
        sample=uniform_samples,
        log_likelihood=uniform_log_likelihood,
    ),
    "flm": _flow(),
    "flm_continued": _flow(time_reparameterization_end=60.0),
    "fmlm": _flow_map("flm"),
    "fmlm_continued": _flow_map("flm_continued"),
}
