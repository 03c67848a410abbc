# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Parameters and output of `generate()`: defaults, precedence, and the sampler, rounds and processors that they select."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CompileConfig,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .sampling_flm import (
    BlockByBlock,
    CommitRule,
    PosteriorRefinement,
    SamplerConfig,
    StochasticFlowMapSamplerConfig,
    StoppingRule,
    load_sampler_config,
)
from .utils_flm import as_python


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that concern the download of files
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_DOWNLOAD_ARGUMENTS += ("_from_auto", "_from_pipeline")


# Parameters of transformers that do not exist here, and what to pass instead
_RENAMED_PARAMETERS = {
    "num_return_sequences": "pass `num_samples`, the number of samples in all; calls accept both",
    "max_new_tokens": "pass `length`, the number of tokens of a sample with its prompt; calls accept both",
    "max_length": "pass `length`",
    "min_length": "pass `length`; with `pad_after_eos`, texts end at their first EOS token",
    "min_new_tokens": "pass `length`; with `pad_after_eos`, texts end at their first EOS token",
    "do_sample": "leave it out: samples differ by their noise, see `generator`; `BridgeSamplerConfig` also draws tokens",
    "num_beams": "leave it out: tokens are generated in parallel",
    "repetition_penalty": "pass a `logits_processor`",
    "seed": "pass `generator=torch.Generator().manual_seed(seed)`",
    "stopping_criteria": "pass `pad_after_eos=True` to end texts at their EOS token, or a `callback` to watch every step",
    "return_full_text": "leave it out: samples include their prompts",
    "num_inference_steps": "pass `num_steps`; calls accept both",
    "inputs": "pass `input_ids`",
    "inputs_embeds": "pass `input_ids`, or a `prior_state` to start from",
    **dict.fromkeys(
        ("use_cache", "cache_implementation", "cache_config", "past_key_values"),
        "leave it out: tokens are generated in parallel, without a cache",
    ),
    **dict.fromkeys(
        ("num_beam_groups", "length_penalty", "early_stopping", "assistant_model", "prompt_lookup_num_tokens"),
        "leave it out: tokens are generated in parallel",
    ),
    **dict.fromkeys(
        ("min_p", "typical_p", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
        "pass a `logits_processor`",
    ),
    **dict.fromkeys(
        ("output_scores", "output_logits"),
        "pass `output_drafts=True` for the tokens of every step, or call `model.posterior` for probabilities",
    ),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), "pass it to `model(...)`"),
    **dict.fromkeys(("max_time", "stop_strings"), "pass a `callback` to watch every step"),
}

# Values of other parameters that are accepted, because they ask for what happens anyway
_NEUTRAL_VALUES = {
    "use_cache": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}


def _without_neutral(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters without those that ask for what happens anyway."""
    return {
        name: value
        for name, value in parameters.items()
        if name not in _NEUTRAL_VALUES or value not in (None, _NEUTRAL_VALUES[name])
    }


# Parameters that `transformers.TextGenerationPipeline` always passes
_OF_OTHER_PIPELINES = {"max_new_tokens", "do_sample"}

# Processors that look at the prefix, which is empty: all tokens are generated in parallel
_NEEDS_PREFIX = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


class FLMGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~FLMGenerationMixin.generate`], saved in `generation_config.json`. `None` stands for the model's default.

    Args:
        num_samples (`int`, *optional*, defaults to 1):
            Number of samples in all.
        num_steps (`int`, *optional*, defaults to 64):
            Number of steps from noise to text, which is the number of forward passes. With `num_rounds` or `block_length`,
            the number of steps of each round or block.
        timestep_grid (`list[float]`, *optional*):
            Reparameterized times of the steps, increasing from 0 to 1. Evenly spaced by default. Sets `num_steps`.
        length (`int`, *optional*):
            Number of tokens of each sample, prompt included. By default the length that the model was trained for
            (`config.max_position_embeddings`).
        batch_size (`int`, *optional*, defaults to 64):
            Maximum number of samples per forward pass. Changes speed and memory, not the samples.
        temperature (`float`, *optional*):
            Divides the logits of every step. Below 1, samples become more likely and less diverse. Has no effect where only
            the largest logit counts: at the last step without guidance, unless tokens are drawn. With `num_rounds`, tokens
            are committed by their probability after temperature, top-k, top-p and guidance.
        top_k (`int`, *optional*):
            Keeps the `top_k` most likely tokens of each position at every step.
        top_p (`float`, *optional*):
            Keeps the smallest set of tokens of each position whose probabilities sum to `top_p`.
        gamma (`float`, *optional*):
            Shortcut for `sampler_config=StochasticFlowMapSamplerConfig(gamma)`: share of the noise, in [0, 1], that is drawn
            anew at every step but the last. 0 follows the flow. By default 1 for new flow maps, which corrects errors of earlier
            steps, and 0 for FLMs.
        sampler_config ([`FlowMapSamplerConfig`], [`StochasticFlowMapSamplerConfig`] or [`BridgeSamplerConfig`], *optional*):
            The sampler: how a step estimates the text and moves the state. Follows the flow by default.
        num_fixed_point_iterations (`int`, *optional*, defaults to 1):
            Number of forward passes at each step, for a model with `config.self_conditioning`: each reads the estimate of the
            text of the one before.
        stability_threshold (`int`, *optional*):
            Ends the steps of a text whose tokens have stayed the same for this number of steps, and returns these tokens.
        confidence_threshold (`float`, *optional*):
            Ends the steps of a text once the mean entropy of its unknown tokens, in nats, is below this threshold. With a
            `stability_threshold` as well, both must hold.
        num_rounds (`int`, *optional*):
            Number of refinement rounds (posterior refinement). Each round regenerates all unknown tokens from noise, then
            commits some of them. Works best for models with `config.per_token_timesteps`.
        commit_threshold (`float`, *optional*):
            Commits tokens with at least this probability after each round. By default no token is committed by threshold.
            (With guidance, which leaves the simplex, a "probability" may exceed 1.)
        commit_budget (`int` or `str`, *optional*, defaults to `"uniform"`):
            Number of tokens of each sample that are committed after each round whatever their probability, the most likely
            first. `"uniform"` divides the tokens left by the rounds left, rounded up.
        block_length (`int`, *optional*):
            Generates left to right in blocks of this many tokens. Positions to the right of the block are generated as well,
            then discarded.
        fresh_noise (`bool`, *optional*, defaults to `True`):
            Whether later rounds or blocks start from new noise, instead of the noise of the first one. Only new noise is
            independent of the tokens committed so far.
        guidance_scale (`float`, *optional*):
            Strength of guidance: how far to extrapolate away from the `guidance_model`, or from the `negative_prompt_ids`. 0 turns
            it off. (Other models of transformers count from 1: pass 1 less.)
        reward_scale (`float`, *optional*):
            Weight of the `reward`. With many steps and a small scale, texts become more likely by the factor
            `exp(reward_scale * reward)`; with few steps, by less. 0 turns it off.
        pad_after_eos (`bool`, *optional*, defaults to `False`):
            Whether texts end at their first EOS token, followed by padding. With rounds or blocks, nothing is generated after
            a committed EOS token.
        output_drafts (`bool`, *optional*, defaults to `False`):
            Whether to return the tokens of every step, round or block.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`FLMGenerationOutput`] instead of the tokens alone.
        bos_token_id (`int`, *optional*):
            Beginning-of-sequence token. The pipeline puts it before prompts.
        eos_token_id (`int` or `list[int]`, *optional*):
            End-of-sequence token, or several, for `pad_after_eos`.
        pad_token_id (`int`, *optional*):
            Padding token. By default `eos_token_id`.
    """

    # Names of the parameters of a call, in a resolved configuration: errors and warnings are about these only
    _passed: frozenset[str] = frozenset()

    def __init__(self, **kwargs):
        # The parent's `__init__` is not called: its attributes are about autoregressive decoding.
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
        self.num_fixed_point_iterations: int | None = kwargs.pop("num_fixed_point_iterations", None)
        self.stability_threshold: int | None = kwargs.pop("stability_threshold", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
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
        if unknown := _without_neutral(kwargs):
            raise ValueError(f"Unknown generation parameters {self._suggest(unknown)}.")
        self.validate()

    def __setattr__(self, name: str, value: Any):
        # After `__init__`, reject parameters that would be ignored.
        if "transformers_version" in vars(self) and not name.startswith("_") and name not in vars(self):
            if not _without_neutral({name: value}):
                return
            raise AttributeError(f"Unknown generation parameter {self._suggest([name])}.")
        super().__setattr__(name, as_python(value))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`~transformers.GenerationConfig.from_dict`]. Unknown parameters are ignored with a warning."""
        known = vars(cls())
        if unknown := sorted(config_dict.keys() - known.keys()):
            logger.warning(f"generation_config.json has unknown parameters, which are ignored: {', '.join(unknown)}.")
        return super().from_dict({name: value for name, value in config_dict.items() if name in known}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the parameters that are not `None`, to be saved."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    def _suggest(self, names) -> str:
        """Lists unknown `names`, each with what to pass instead or a similar name."""
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
        """Raises a `ValueError` that names the parameter with an invalid value."""
        counts = ("num_samples", "num_steps", "length", "batch_size", "top_k", "num_rounds", "block_length")
        for name in (*counts, "num_fixed_point_iterations", "stability_threshold"):
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
        if self.confidence_threshold is not None and not (
            isinstance(self.confidence_threshold, (int, float)) and 0 < self.confidence_threshold < math.inf
        ):
            raise ValueError(f"`confidence_threshold` must be a number above 0, got {self.confidence_threshold!r}.")
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
            "num_fixed_point_iterations": 1,
            "commit_budget": "uniform",
            "fresh_noise": True,
            "pad_after_eos": False,
            "output_drafts": False,
            "return_dict_in_generate": False,
        }

    def was_passed(self, name: str) -> bool:
        """Whether the call set this parameter. Other values are stored with the model, or defaults."""
        return name in self._passed

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} has no generation modes: there is one sampler.")

    @classmethod
    def from_model_config(cls, model_config):
        """Returns a configuration with the special tokens of the model."""
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
            The most likely or drawn tokens after every step, or with `num_rounds` or `block_length` after every round or
            block. The last draft is the sample before `pad_after_eos`.
        num_forward_passes (`torch.LongTensor` of shape `(num_samples,)`):
            Number of forward passes for each sample: one per step, or `num_fixed_point_iterations`, twice as many with
            `negative_prompt_ids`, and one more per step with a reward.
            Steps after a text is settled, and rounds and blocks with nothing to generate, do not count.
        tokens_per_forward (`torch.FloatTensor` of shape `(num_samples,)`):
            Number of generated tokens per forward pass for each sample, without padding after its end; 0 without forward passes.
        commit_rounds (`torch.LongTensor` of shape `(num_samples, length)`, *optional*, returned with `num_rounds` or `block_length`):
            The round or block, from 1, that committed each token; 0 for tokens of the prompt.
    """

    sequences: torch.LongTensor | None = None
    drafts: torch.LongTensor | None = None
    num_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    commit_rounds: torch.LongTensor | None = None


def check_types(
    generator: Any,
    logits_processor: Any,
    prior_state: Any,
    noise_source: Any,
    streamer: Any,
    callback: Any,
    compile_config: Any,
):
    """Raises a `ValueError` for an argument of `generate` of a wrong type."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError(
            f"`generator` must be a `torch.Generator`, or a list of one for each sample, got {generator!r}. For a seed pass "
            "`torch.Generator().manual_seed(seed)`."
        )
    if logits_processor is not None and not isinstance(logits_processor, list):
        raise ValueError("`logits_processor` must be a `LogitsProcessorList`: put a single processor into a list.")
    if prior_state is not None and not isinstance(prior_state, torch.Tensor):
        raise ValueError(f"`prior_state` must be a tensor, got `{type(prior_state).__name__}`.")
    if streamer is not None and not isinstance(streamer, BaseStreamer):
        raise ValueError(
            f"`streamer` must be a streamer, such as `TextDiffusionStreamer(tokenizer)`, got {streamer!r}."
        )
    for name, function, takes in (
        ("noise_source", noise_source, "sample indices"),
        ("callback", callback, "step, num_steps and tokens"),
    ):
        if function is not None and not callable(function):
            raise ValueError(f"`{name}` must be a function of {takes}, got {function!r}.")
    if compile_config is not None and not isinstance(compile_config, CompileConfig):
        raise ValueError(f"`compile_config` must be a `CompileConfig`, got `{type(compile_config).__name__}`.")


def resolve_generation_config(
    stored: FLMGenerationConfig,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    sizes: dict[str, int],
    max_length: int,
    num_prompts: int = 1,
    prompt_length: int | None = 0,
) -> FLMGenerationConfig:
    """
    Returns the parameters of a call by precedence: `kwargs`, `generation_config`, `sizes`, `stored`, defaults. The result has
    one sampler, and either rounds, blocks or neither.

    Args:
        stored ([`FLMGenerationConfig`]): The configuration stored with the model.
        generation_config ([`~transformers.GenerationConfig`], *optional*): The argument of the call.
        kwargs (`dict[str, Any]`): Single parameters of the call.
        sizes (`dict[str, int]`): `num_samples` and `length`, where tensors of the call imply them.
        max_length (`int`): The maximum length of the model.
        num_prompts (`int`, *optional*, defaults to 1): Number of prompts.
        prompt_length (`int`, *optional*, defaults to 0): Length of all prompts. `None` if they differ in length.
    """
    config = FLMGenerationConfig() if generation_config is None else as_flm_generation_config(generation_config)
    kwargs = _without_neutral(kwargs)
    unknown = [name for name in kwargs if name.startswith("_") or name not in vars(config)]
    if not _OF_OTHER_PIPELINES <= set(unknown):
        kwargs = _translate_names(kwargs, num_prompts, prompt_length)
        unknown = [name for name in unknown if name in kwargs]
    if unknown:
        message = f"`generate()` got unknown arguments: {config._suggest(unknown)}."
        if _OF_OTHER_PIPELINES <= set(unknown):
            message += (
                " If they are from `pipeline()` with a model that is loaded already, pass it "
                "`pipeline_class=modeling_flm.FLMPipeline`, or the name or folder of the model."
            )
        raise ValueError(message)
    config.update(**{name: value for name, value in kwargs.items() if value is not None})
    config._passed = frozenset(name for name, value in vars(config).items() if value is not None)
    config.update(defaults_only=True, **sizes)
    config.update(defaults_only=True, **stored.to_dict())
    _resolve_steps(config)
    config.update(defaults_only=True, **config._get_default_generation_params(), length=max_length)
    if config.length > max_length:
        raise ValueError(
            f"`length` is {config.length}, but the model has at most {max_length} positions "
            "(`config.max_position_embeddings`)."
        )
    _resolve_sampler(config)
    _resolve_rounds(config)
    if config.pad_after_eos and config.eos_token_id is None:
        raise ValueError("`pad_after_eos` needs an `eos_token_id`.")
    return config


def _translate_names(kwargs: dict[str, Any], num_prompts: int, prompt_length: int | None) -> dict[str, Any]:
    """Replaces parameters of transformers and diffusers by the parameters here that mean the same."""
    kwargs = dict(kwargs)
    names = {"num_inference_steps": "num_steps", "num_return_sequences": "num_samples", "max_new_tokens": "length"}
    for name, own in names.items():
        value = as_python(kwargs.pop(name, None))
        if value is None:
            continue
        if kwargs.get(own) is not None:
            raise ValueError(f"`{name}` and `{own}` were both passed: leave one of them out.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if name == "num_return_sequences":
            value *= num_prompts
        elif name == "max_new_tokens":
            if prompt_length is None:
                raise ValueError(
                    "`max_new_tokens` needs prompts of the same length: pass `length`, the number of tokens of a sample with its "
                    "prompt."
                )
            value += prompt_length
        kwargs[own] = value
    return kwargs


def _resolve_steps(config: FLMGenerationConfig):
    """`num_steps` of a call replaces a stored grid; otherwise a grid sets `num_steps`."""
    if config.was_passed("num_steps") and not config.was_passed("timestep_grid"):
        config.timestep_grid = None
    elif config.timestep_grid is not None:
        num_steps = len(config.timestep_grid) - 1
        if config.was_passed("num_steps") and config.num_steps != num_steps:
            raise ValueError(
                f"`num_steps={config.num_steps}` does not match the {num_steps + 1} times of `timestep_grid`: leave it out."
            )
        config.num_steps = num_steps


def _resolve_sampler(config: FLMGenerationConfig):
    """The sampler of a call replaces the stored one; `gamma` is a shortcut for a sampler."""
    if config.was_passed("sampler_config"):
        if config.was_passed("gamma") and config.gamma:
            raise ValueError(
                f"`gamma={config.gamma}` cannot be combined with `sampler_config`: leave it out, or pass "
                f"`StochasticFlowMapSamplerConfig(gamma={config.gamma})`."
            )
    elif config.was_passed("gamma") or config.sampler_config is None:
        config.sampler_config = StochasticFlowMapSamplerConfig(config.gamma or 0.0)


def _resolve_rounds(config: FLMGenerationConfig):
    """Rounds or blocks of a call replace stored ones."""
    if config.was_passed("num_rounds") and config.was_passed("block_length"):
        raise ValueError("`num_rounds` cannot be combined with `block_length`: leave one of them out.")
    if config.was_passed("block_length"):
        config.num_rounds = None
    elif config.num_rounds is not None:
        config.block_length = None
    for name in ("commit_threshold", "commit_budget"):
        if config.was_passed(name) and config.num_rounds is None:
            raise ValueError(f"`{name}={getattr(config, name)!r}` needs `num_rounds`, such as 4.")
    if config.was_passed("fresh_noise") and config.num_rounds is None and config.block_length is None:
        raise ValueError(f"`fresh_noise={config.fresh_noise}` needs `num_rounds` or `block_length`.")


def as_flm_generation_config(generation_config: GenerationConfig) -> FLMGenerationConfig:
    """
    Copies the parameters of a configuration, which may be of another class of this name: remote code and an installed package
    have different classes.
    """
    if not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be a `{FLMGenerationConfig.__name__}`, got `{type(generation_config).__name__}`."
        )
    settings = generation_config.to_diff_dict()
    return FLMGenerationConfig(**{name: value for name, value in settings.items() if value is not None})


def load_generation_config(
    config_class: type[GenerationConfig], name: str, options: dict[str, Any]
) -> GenerationConfig | None:
    """
    Loads the generation configuration of a model, or returns `None` if it has none.

    Args:
        config_class (`type`): The class of the configuration.
        name (`str`): Name on the Hub, or folder.
        options (`dict[str, Any]`): Arguments of `from_pretrained` of the model. Those that belong to its configuration are left out.
    """
    names = {*vars(config_class()), *_DOWNLOAD_ARGUMENTS}
    try:
        return config_class.from_pretrained(name, **{each: value for each, value in options.items() if each in names})
    except OSError as error:
        if isinstance(error.__context__, ValueError):  # the file is damaged
            raise
        logger.info("No generation_config.json was found: `generate()` uses its defaults.")
    return None


def build_commit_rule(config: FLMGenerationConfig) -> CommitRule:
    """Returns the rule for refinement rounds or blocks that a resolved configuration selects."""
    if config.num_rounds is not None:
        threshold, budget = config.commit_threshold, config.commit_budget
        return PosteriorRefinement(config.num_rounds, threshold, budget, config.fresh_noise)
    if config.block_length is not None:
        return BlockByBlock(config.block_length, config.length, config.fresh_noise)
    return CommitRule()


def build_stopping_rule(
    config: FLMGenerationConfig, rule: CommitRule, compile_config: CompileConfig | None
) -> StoppingRule | None:
    """
    Returns the rule for ending the steps of a text that a resolved configuration selects, if any. Raises a `ValueError` for a bad
    combination.
    """
    thresholds = {name: getattr(config, name) for name in ("stability_threshold", "confidence_threshold")}
    if all(value is None for value in thresholds.values()):
        return None
    names = [f"`{name}`" for name, value in thresholds.items() if value is not None]
    if rule.num_rounds is not None:
        raise ValueError(f"{' and '.join(names)} cannot be combined with rounds or blocks: leave one of them out.")
    if compile_config is not None:
        raise ValueError(
            f"{' and '.join(names)} cannot be combined with `compile_config`, whose steps have a batch of constant size: leave one of "
            "them out."
        )
    return StoppingRule(**thresholds)


def build_logits_processor(
    config: FLMGenerationConfig, logits_processor: LogitsProcessorList | None
) -> LogitsProcessorList:
    """Returns the processors of the call, followed by temperature, top-k and top-p."""
    processors = LogitsProcessorList(logits_processor or [])
    if config.temperature is not None and config.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k is not None:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    return processors


def warn_about_compiled_forward(model: PreTrainedModel):
    """Warns if the model's `forward` was compiled, which `generate` does not call."""
    is_compiled = getattr(vars(model).get("forward"), "_torchdynamo_orig_callable", None) is not None
    if model._compiled_call_impl is not None or is_compiled:
        logger.warning_once(
            "`generate()` does not call the compiled `forward`: pass `compile_config=CompileConfig()` to compile its steps, or "
            "call `model.compile_regions()`."
        )


def warn_about_no_effect(config: FLMGenerationConfig, logits_processor: LogitsProcessorList | None, only_argmax: bool):
    """
    Warns about arguments of a call that have no effect.

    Args:
        config ([`FLMGenerationConfig`]): The resolved configuration.
        logits_processor ([`~transformers.LogitsProcessorList`], *optional*): The processors of the call.
        only_argmax (`bool`): Whether the last step uses nothing of the logits but their argmax.
    """
    neutral = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    names = [name for name, value in neutral.items() if config.was_passed(name) and getattr(config, name) != value]
    if names and config.num_steps == 1 and only_argmax:
        logger.warning_once(
            f"`{'`, `'.join(names)}` {'has' if len(names) == 1 else 'have'} no effect in one step, which returns the most likely "
            "tokens: take more steps, or draw tokens with `sampler_config=BridgeSamplerConfig()`."
        )
    if config.was_passed("gamma") and config.gamma and config.num_steps == 1:
        logger.warning_once("`gamma` has no effect in one step: take more steps.")
    if names := sorted({type(each).__name__ for each in logits_processor or [] if _needs_prefix(each)}):
        logger.warning_once(
            f"`{'`, `'.join(names)}` conditions on previous tokens, but tokens are generated in parallel: it only affects single "
            "tokens."
        )


def _needs_prefix(processor: Callable) -> bool:
    """Whether a processor depends on the prefix, at least in part."""
    if isinstance(processor, SequenceBiasLogitsProcessor):  # the base class of bad words, too
        return any(len(sequence) > 1 for sequence in processor.sequence_bias)
    return isinstance(processor, _NEEDS_PREFIX)


__all__ = ["FLMGenerationConfig", "FLMGenerationOutput"]
