# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters of generation, and what it returns."""

import copy
import difflib
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from .sampling_flm import SamplerConfig, StochasticFlowMapSamplerConfig, load_sampler_config


logger = logging.get_logger(__name__)


# Parameters of transformers that do not exist here, and what to pass instead.
_RENAMED_PARAMETERS = {
    "num_return_sequences": "pass `num_samples`, the number of samples in all; a pipeline accepts both",
    "max_new_tokens": "pass `length`, the number of tokens of a text with its prompt",
    "max_length": "pass `length`",
    "min_length": "pass `length`; texts end where `pad_after_eos` finds their end",
    "min_new_tokens": "pass `length`; texts end where `pad_after_eos` finds their end",
    "do_sample": "leave it out: texts differ by their noise, see `generator`; `BridgeSamplerConfig` draws tokens, too",
    "num_beams": "leave it out: texts are not written token by token",
    "repetition_penalty": "pass a `logits_processor`",
    "seed": "pass `generator=torch.Generator().manual_seed(seed)`",
    "stopping_criteria": "pass `pad_after_eos=True` for texts that end, or a `callback` to watch every step",
    "return_full_text": "leave it out: texts have their prompts in them",
    "num_inference_steps": "pass `num_steps`",
}

# What `transformers.TextGenerationPipeline` passes of its own accord.
_OF_OTHER_PIPELINES = {"max_new_tokens", "do_sample"}


class FLMGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~FLMGenerationMixin.generate`], saved in `generation_config.json`. `None` stands for the default of
    the model.

    Args:
        num_samples (`int`, *optional*, defaults to 1):
            The number of texts to generate.
        num_steps (`int`, *optional*, defaults to 64):
            The number of steps from noise to text, which is the number of forward passes; with `num_rounds` or `block_length`
            that of each round or block.
        timestep_grid (`list[float]`, *optional*):
            The reparameterized times of the steps, from 0 to 1, by default evenly spaced. They set `num_steps`.
        length (`int`, *optional*):
            The number of tokens of each text. By default the length that the model was trained for
            (`config.max_position_embeddings`).
        batch_size (`int`, *optional*, defaults to 64):
            The most texts that are generated at a time. It changes speed and memory, not the texts.
        temperature (`float`, *optional*):
            Divides the logits of every step. Below 1 texts become more likely and less diverse. Without effect where
            only the largest logit counts, which is at the last step without guidance, unless tokens are drawn. With
            `num_rounds`, probabilities decide which tokens are kept, and they are those after temperature, top-k, top-p and
            guidance.
        top_k (`int`, *optional*):
            Keeps the `top_k` most likely tokens of each position at every step.
        top_p (`float`, *optional*):
            Keeps the smallest set of tokens of each position whose probabilities reach `top_p`.
        gamma (`float`, *optional*):
            Short for `sampler_config=StochasticFlowMapSamplerConfig(gamma)`: the share of the noise, in [0, 1], that is drawn
            anew at every step but the last. 0 follows the flow, which is the default.
        sampler_config ([`FlowMapSamplerConfig`], [`StochasticFlowMapSamplerConfig`] or [`BridgeSamplerConfig`], *optional*):
            What a step takes from the model, and how it moves the state. Follows the flow by default.
        num_rounds (`int`, *optional*):
            Posterior refinement: how often what is not known is written, each time from noise. After each round some tokens
            become known. The model should be told the time of each token (`config.per_token_timesteps`).
        commit_threshold (`float`, *optional*):
            Tokens become known after a round of posterior refinement if their probability is at least this. By default none
            does for that reason. (With guidance, which leaves the simplex, a "probability" may be above 1.)
        commit_budget (`int` or `str`, *optional*, defaults to `"uniform"`):
            How many of the likeliest tokens of each text become known after a round whatever their probability: a number, or
            `"uniform"` for as many as leave equally many to each round.
        block_length (`int`, *optional*):
            Writes texts from left to right, so many tokens at a time. Each time everything to the right is written, too, and
            dropped.
        fresh_noise (`bool`, *optional*, defaults to `True`):
            Whether tokens that are written again start from new noise, and not from what they started from before. Only new
            noise is independent of the tokens that are known by then.
        guidance_scale (`float`, *optional*):
            How far to go beyond the model, away from the `guidance_model` (autoguidance). 0 turns it off.
        reward_scale (`float`, *optional*):
            The weight of the `reward`. In many steps, and as long as it is small, texts become more likely by the factor
            `exp(reward_scale * reward)`; in few, less so. 0 turns it off.
        pad_after_eos (`bool`, *optional*, defaults to `False`):
            Whether texts end at their first end-of-sequence token, after which there is nothing but padding. With rounds or
            blocks, nothing more is written after an end that is known.
        output_drafts (`bool`, *optional*, defaults to `False`):
            Whether to return the tokens of every step, or of every round or block.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`FLMGenerationOutput`] rather than the tokens alone.
        bos_token_id (`int`, *optional*):
            The token that begins a text. The pipeline begins prompts with it.
        eos_token_id (`int` or `list[int]`, *optional*):
            The token that ends a text, or several, for `pad_after_eos`.
        pad_token_id (`int`, *optional*):
            The token that fills a text up. By default `eos_token_id`.
    """

    def __init__(self, **kwargs):
        # The parent's attributes are about autoregressive decoding: none of them is wanted here.
        self.num_samples: int | None = kwargs.pop("num_samples", None)
        self.num_steps: int | None = kwargs.pop("num_steps", None)
        self.length: int | None = kwargs.pop("length", None)
        self.batch_size: int | None = kwargs.pop("batch_size", None)
        self.temperature: float | None = kwargs.pop("temperature", None)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.timestep_grid: list[float] | None = kwargs.pop("timestep_grid", None)
        self.gamma: float | None = kwargs.pop("gamma", None)
        self.sampler_config: SamplerConfig | None = kwargs.pop("sampler_config", None)
        self.num_rounds: int | None = kwargs.pop("num_rounds", None)
        self.commit_threshold: float | None = kwargs.pop("commit_threshold", None)
        self.commit_budget: int | str | None = kwargs.pop("commit_budget", None)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.fresh_noise: bool | None = kwargs.pop("fresh_noise", None)
        self.guidance_scale: float | None = kwargs.pop("guidance_scale", None)
        self.reward_scale: float | None = kwargs.pop("reward_scale", None)
        self.pad_after_eos: bool | None = kwargs.pop("pad_after_eos", None)
        self.output_drafts: bool | None = kwargs.pop("output_drafts", None)
        self.return_dict_in_generate: bool | None = kwargs.pop("return_dict_in_generate", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)

        self._commit_hash: str | None = kwargs.pop("_commit_hash", None)
        self._from_model_config: bool | None = kwargs.pop("_from_model_config", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        if kwargs:
            raise ValueError(f"Unknown generation parameters {self._suggest(kwargs)}.")
        self.validate()

    def __setattr__(self, name: str, value: Any):
        # Once `__init__` is through: what nobody would read is refused here, not where a saved folder is loaded.
        if "transformers_version" in vars(self) and not name.startswith("_") and name not in vars(self):
            raise AttributeError(f"Unknown generation parameter {self._suggest([name])}.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`~transformers.GenerationConfig.from_dict`]: what a file has that this version does not know is left out."""
        known = vars(cls())
        if unknown := sorted(config_dict.keys() - known.keys()):
            logger.warning(f"generation_config.json has unknown parameters, which are ignored: {', '.join(unknown)}.")
        return super().from_dict({name: value for name, value in config_dict.items() if name in known}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The parameters that are not `None`, which are those that are saved."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    def _suggest(self, names) -> str:
        """The unknown `names`, each with what to pass in its place, or the parameter that may have been meant."""
        known = [name for name in vars(self) if not name.startswith("_")]
        hints = []
        for name in names:
            if name in _RENAMED_PARAMETERS:
                hints.append(f"`{name}` ({_RENAMED_PARAMETERS[name]})")
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hints.append(f"`{name}`" + (f" (did you mean `{close[0]}`?)" if close else ""))
        return ", ".join(hints)

    def validate(self, **kwargs):
        """Raises a `ValueError` that names the parameter whose value cannot be used."""
        for name in ("num_samples", "num_steps", "length", "batch_size", "top_k", "num_rounds", "block_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.temperature is not None and not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise ValueError(f"`temperature` must be a number above 0, got {self.temperature!r}.")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must be a number above 0 and at most 1, got {self.top_p!r}.")
        threshold, budget = self.commit_threshold, self.commit_budget
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 < threshold <= 1):
            raise ValueError(f"`commit_threshold` must be a probability above 0 and at most 1, got {threshold!r}.")
        is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0
        if budget is not None and budget != "uniform" and not is_count:
            raise ValueError(f"`commit_budget` must be 'uniform' or a number of tokens, got {budget!r}.")
        if self.fresh_noise is not None and not isinstance(self.fresh_noise, bool):
            raise ValueError(f"`fresh_noise` must be `True` or `False`, got {self.fresh_noise!r}.")
        if self.gamma is not None:
            StochasticFlowMapSamplerConfig(self.gamma)
        if self.sampler_config is not None:
            self.sampler_config = load_sampler_config(self.sampler_config)
        for name in ("guidance_scale", "reward_scale"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
        if self.timestep_grid is not None:
            times = self.timestep_grid
            if not isinstance(times, (list, tuple)) or not all(isinstance(tau, (int, float)) for tau in times):
                raise ValueError(f"`timestep_grid` must be a list of numbers, got {times!r}.")
            is_increasing = all(first < second for first, second in zip(times, times[1:]))
            if len(times) < 2 or times[0] != 0 or times[-1] != 1 or not is_increasing:
                raise ValueError(f"`timestep_grid` must increase from 0 to 1, got {times!r}.")

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {
            "num_samples": 1,
            "num_steps": 64,
            "batch_size": 64,
            "commit_budget": "uniform",
            "fresh_noise": True,
            "pad_after_eos": False,
            "output_drafts": False,
            "return_dict_in_generate": False,
        }

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has no generation modes: there is one sampler.")

    @classmethod
    def from_model_config(cls, model_config):
        """A configuration with the special tokens of the model."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(model_config, name) for name in names})


@dataclass
class FLMGenerationOutput(ModelOutput):
    """
    Output of [`~FLMGenerationMixin.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(num_samples, length)`):
            The generated tokens.
        drafts (`torch.LongTensor` of shape `(num_samples, num_drafts, length)`, *optional*, returned when `output_drafts=True`):
            The tokens that were most likely, or drawn, at every step; with `num_rounds` or `block_length` those that every
            round or block ended with. The last draft is the text, before `pad_after_eos`.
        num_forward_passes (`torch.LongTensor` of shape `(num_samples,)`):
            How often the model was evaluated for each text: once a step, and once more with a reward. Rounds and blocks that
            find nothing to write in a text do not count.
        commit_rounds (`torch.LongTensor` of shape `(num_samples, length)`, *optional*, returned with `num_rounds` or `block_length`):
            The round or block, from 1, after which each token was known, and 0 where it was from the beginning.
    """

    sequences: torch.LongTensor | None = None
    drafts: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    commit_rounds: torch.LongTensor | None = None


def explicit_settings(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The parameters of this call, without the model's own."""
    explicit = generation_config.to_diff_dict() if isinstance(generation_config, GenerationConfig) else {}
    return {name: value for name, value in {**explicit, **kwargs}.items() if value is not None}


def set_sizes(
    kwargs: dict[str, Any],
    explicit: dict[str, Any],
    input_ids: torch.Tensor | None,
    masks: tuple[torch.Tensor | None, torch.Tensor | None],
    prior_state: torch.Tensor | None,
):
    """Puts `num_samples` and `length` into `kwargs` where other arguments say them."""
    attention_mask, prompt_mask = masks
    sizes = {name: explicit[name] for name in ("num_samples", "length") if name in explicit}
    if prior_state is not None and prior_state.dim() == 3:
        sizes = {"num_samples": prior_state.shape[0], "length": prior_state.shape[1]} | sizes
    whole = prompt_mask if prompt_mask is not None else attention_mask if input_ids is None else None
    if whole is not None:  # it has all positions of a text
        length = sizes.setdefault("length", whole.shape[1])
        if attention_mask is not None and length != whole.shape[1]:
            raise ValueError(
                f"`attention_mask` has {whole.shape[1]} positions, which are all there are: leave out `length={length}`."
            )
    tensor = input_ids if input_ids is not None else attention_mask
    if tensor is not None:
        num_samples = sizes.setdefault("num_samples", len(tensor))
        if isinstance(num_samples, int) and (num_samples < 1 or num_samples % max(len(tensor), 1) != 0):
            name = "input_ids" if input_ids is not None else "attention_mask"
            raise ValueError(
                f"`num_samples={num_samples}` is not a multiple of the {len(tensor)} rows of `{name}`: every row has "
                "equally many texts."
            )
    kwargs.update(sizes)


def prepare_generation_config(
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    explicit: dict[str, Any],
    own: FLMGenerationConfig,
    max_length: int,
) -> FLMGenerationConfig:
    """Parameters by precedence: arguments, `generation_config`, those of the model (`own`), defaults."""
    if generation_config is None:
        config = copy.deepcopy(own)
    else:
        config = own_generation_config(generation_config)
    if unknown := [name for name in kwargs if name.startswith("_") or name not in vars(config)]:
        message = f"`generate()` got unknown arguments: {config._suggest(unknown)}."
        if _OF_OTHER_PIPELINES <= set(unknown):
            message += (
                " If they are from `pipeline()` with a model that is loaded already, pass it "
                "`pipeline_class=modeling_flm.FLMPipeline`, or the name or folder of the model."
            )
        raise ValueError(message)
    config.update(**kwargs)
    config.update(defaults_only=True, **own.to_dict())
    if "num_steps" in explicit and "timestep_grid" not in explicit:
        config.timestep_grid = None
    elif config.timestep_grid is not None:
        if explicit.get("num_steps", len(config.timestep_grid) - 1) != len(config.timestep_grid) - 1:
            raise ValueError(
                f"`num_steps={explicit['num_steps']}` does not match the {len(config.timestep_grid)} times of `timestep_grid`: leave it out."
            )
        config.num_steps = len(config.timestep_grid) - 1
    config.update(defaults_only=True, **config._get_default_generation_params())
    config.update(defaults_only=True, length=max_length)
    if config.length > max_length:
        raise ValueError(
            f"`length` is {config.length}, but the model was made for at most {max_length} tokens "
            "(`config.max_position_embeddings`)."
        )
    return config


def own_generation_config(generation_config: GenerationConfig) -> FLMGenerationConfig:
    """A copy of what the user set, as the model's own class: code from a repository has another one than a package."""
    if not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be a `{FLMGenerationConfig.__name__}`, got "
            f"`{type(generation_config).__name__}`."
        )
    settings = generation_config.to_diff_dict()
    return FLMGenerationConfig(**{name: value for name, value in settings.items() if value is not None})


__all__ = ["FLMGenerationConfig", "FLMGenerationOutput"]
