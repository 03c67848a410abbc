# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The models that `study.py` compares: how each is built, trained, sampled and evaluated."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
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
from study_data import Data, StudyArguments
from transformers import GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

from modeling_flm import FLMConfig, FLMModel, FMLMModel
from modeling_flm.trainers import (
    AveragedTrainer,
    DataCollatorForFLM,
    EMACallback,
    FLMTrainer,
    FLMTrainingArguments,
    FMLMTrainer,
    FMLMTrainingArguments,
)


# A short distillation should often train on the whole interval from 0 to 1, which one-step sampling uses.
BOUNDARY_PROBABILITY = 0.25


class StudyModel(ABC):
    """
    A model to compare.

    Attributes:
        model_class (`type`): Class of the model.
        teacher (`str`, *optional*): Name of the model it is distilled from.
        searched_as (`str`, *optional*): Name of the model whose learning rate it uses. By default its own is searched.
        weights_of (`str`, *optional*): Name of the model whose weights it samples with another sampler. Then it is not trained.
        one_pass_per_token (`bool`): Whether sampling takes one forward pass per token, instead of any number of steps.
        has_temperature_at_one_step (`bool`): Whether a temperature has an effect on sampling in one step.
    """

    model_class: type[PreTrainedModel] = FLMModel
    teacher: str | None = None
    searched_as: str | None = None
    weights_of: str | None = None
    one_pass_per_token = False
    has_temperature_at_one_step = True

    @abstractmethod
    def new_trainer(
        self, config: FLMConfig, settings: dict, data: Data, args: StudyArguments, teacher: FLMModel | None
    ) -> Trainer:
        """
        Returns the trainer of a new model.

        Args:
            config ([`FLMConfig`]): Configuration of the flow-based model. Other models take the same sizes from it.
            settings (`dict`): Arguments of [`~transformers.TrainingArguments`].
            data (`Data`): Training and validation examples, and the tokenizer.
            args (`StudyArguments`): Arguments of the study.
            teacher ([`FLMModel`], *optional*): The trained teacher, for a model that has one.
        """

    @abstractmethod
    def sample(
        self,
        model: PreTrainedModel,
        num_samples: int,
        length: int,
        num_steps: int,
        temperature: float,
        generator: torch.Generator,
    ) -> torch.LongTensor:
        """Returns samples of shape `(num_samples, length)`."""

    @abstractmethod
    def log_likelihood(
        self, model: PreTrainedModel, input_ids: torch.LongTensor, num_times: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Returns the log-likelihoods in nats, or lower bounds from `num_times` noise levels, of shape `(num_texts,)`."""

    def load(self, folder: Path) -> PreTrainedModel:
        return self.model_class.from_pretrained(folder)


class PeerModel(StudyModel):
    """A model that is not flow-based, trained by a trainer of `peers/`."""

    trainer_class: type[AveragedTrainer]

    @abstractmethod
    def new_model(self, config: FLMConfig) -> PreTrainedModel:
        """Returns a new model as large as the flow-based model with this configuration."""

    def new_trainer(self, config, settings, data, args, teacher) -> AveragedTrainer:
        return self.trainer_class(
            self.new_model(config),
            TrainingArguments(**settings, remove_unused_columns=False),
            train_dataset=data.tokens["train"],
            eval_dataset=data.tokens["validation"],
            data_collator=DataCollatorForFLM(data.tokenizer.pad_token_id),
            processing_class=data.tokenizer,
            ema=EMACallback(args.ema_decay),
        )


class GPT2(PeerModel):
    """An autoregressive model."""

    model_class = GPT2LMHeadModel
    trainer_class = AutoregressiveTrainer
    one_pass_per_token = True

    def new_model(self, config) -> GPT2LMHeadModel:
        return new_gpt2(config)

    def sample(self, model, num_samples, length, num_steps, temperature, generator) -> torch.LongTensor:
        return autoregressive_samples(model, num_samples, length, temperature, generator)

    def log_likelihood(self, model, input_ids, num_times, generator) -> torch.Tensor:
        return autoregressive_log_likelihood(model, input_ids)


class MDLM(PeerModel):
    """Masked diffusion."""

    trainer_class = MaskedDiffusionTrainer
    sample = staticmethod(ancestral_samples)
    log_likelihood = staticmethod(masked_log_likelihood)

    def new_model(self, config) -> FLMModel:
        # Absolute positions matter where texts begin and end, and not in blocks of a longer text.
        return new_masked_model(config, with_positions=config.eos_token_id is not None)


class Duo(PeerModel):
    """Uniform-state diffusion."""

    trainer_class = UniformDiffusionTrainer
    sample = staticmethod(uniform_samples)
    log_likelihood = staticmethod(uniform_log_likelihood)

    def new_model(self, config) -> FLMModel:
        return FLMModel(config)


class FLM(StudyModel):
    """A flow-based language model."""

    has_temperature_at_one_step = False  # the last step takes the most likely tokens
    generate_kwargs: dict = {}  # of `generate()`, beyond the model's own defaults

    def new_trainer(self, config, settings, data, args, teacher) -> FLMTrainer:
        return FLMTrainer(
            FLMModel(config),
            FLMTrainingArguments(**settings, ema_decay=args.ema_decay, prompt_fraction=args.prompt_fraction),
            train_dataset=data.tokens["train"],
            eval_dataset=data.tokens["validation"],
            processing_class=data.tokenizer,
        )

    def sample(self, model, num_samples, length, num_steps, temperature, generator) -> torch.LongTensor:
        return model.generate(
            num_samples=num_samples,
            length=length,
            num_steps=num_steps,
            temperature=temperature,
            batch_size=num_samples,
            generator=generator,
            **self.generate_kwargs,
        )

    def log_likelihood(self, model, input_ids, num_times, generator) -> torch.Tensor:
        return model.log_likelihood_bound(input_ids, num_times=num_times, generator=generator).log_likelihood


class FMLM(FLM):
    """A flow map, distilled from the FLM."""

    model_class = FMLMModel
    teacher = "flm"
    searched_as = "flm"

    def new_trainer(self, config, settings, data, args, teacher) -> FMLMTrainer:
        return FMLMTrainer(
            FMLMModel.from_flm(teacher),
            FMLMTrainingArguments.from_preset(
                "single_stage",
                **settings,
                ema_decay=args.ema_decay,
                boundary_probability=BOUNDARY_PROBABILITY,
                prompt_fraction=args.prompt_fraction,
            ),
            teacher=teacher,
            train_dataset=data.tokens["train"],
            eval_dataset=data.tokens["validation"],
            processing_class=data.tokenizer,
        )


class FMLMAlongTheFlow(FMLM):
    """The same flow map, without new noise between steps."""

    weights_of = "fmlm"
    generate_kwargs = {"gamma": 0.0}


STUDY_MODELS = {
    "gpt2": GPT2(),
    "mdlm": MDLM(),
    "duo": Duo(),
    "flm": FLM(),
    "fmlm": FMLM(),
    "fmlm_gamma_0": FMLMAlongTheFlow(),
}
