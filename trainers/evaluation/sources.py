# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Models as sources of texts: flow-based models and causal language models, with one interface."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_flm import BridgeSamplerConfig, FLMConfig
from modeling_flm.hub.card import default_num_steps
from modeling_flm.hub.loading import load_checked
from modeling_flm.known_tokens_flm import lengths_up_to_eos

from .samples import (
    find_bos_token,
    find_eos_tokens,
    generate_causal_samples,
    generate_samples,
    sample_generators,
)


# Values of `Setting.sampler`, and of flags
SAMPLERS = ("flow_map", "bridge")

# Parameters of `generate()` for loops around the sampler
LOOP_PARAMETERS = ("num_rounds", "commit_threshold", "commit_budget", "block_length", "fresh_noise")

# Parameters of `generate()` that the model's generation config may set, and that go into the description of a source.
GENERATION_PARAMETERS = (
    *("gamma", "temperature", "top_k", "top_p", "length", "pad_after_eos"),
    *LOOP_PARAMETERS,
    "guidance_scale",
)


@dataclass(frozen=True)
class Setting:
    """
    One row of the table: the settings that differ between the rows.

    Args:
        num_steps (`int`, *optional*): Number of sampling steps. By default the model's. Not for causal models.
        sampler (`str`, *optional*): `"flow_map"` or `"bridge"`. By default the model's. Not for causal models.
        temperature (`float`, *optional*): Temperature. By default the source's.
    """

    num_steps: int | None = None
    sampler: str | None = None
    temperature: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings that are not `None`."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def name(self) -> str:
        """Part of a file name, such as "4" for four steps, or "bridge_4_t0.9"."""
        parts = [self.sampler, self.num_steps, None if self.temperature is None else f"t{self.temperature:g}"]
        return "_".join(str(part) for part in parts if part is not None)


@dataclass
class Sample:
    """A sample: its tokens with padding, their number up to its end, and the number of forward passes of each network."""

    tokens: list[int]
    num_tokens: int
    num_forward_passes: int


@dataclass
class FlowSource:
    """
    A flow-based model as the source of texts. A text depends on its seed and index only.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        guidance_model ([`~transformers.PreTrainedModel`], *optional*): A weaker model for autoguidance.
        generate_kwargs (`dict[str, Any]`, *optional*):
            Parameters of [`~FLMGenerationMixin.generate`] for all settings, such as `gamma` and `length`. The others are the
            model's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    guidance_model: PreTrainedModel | None = None
    generate_kwargs: dict[str, Any] = field(default_factory=dict)

    def _get_parameter(self, name: str) -> Any:
        """Returns the value of a parameter in effect: this source's or else the model's."""
        value = self.generate_kwargs.get(name)
        overrides_loop = any(self.generate_kwargs.get(loop) is not None for loop in ("num_rounds", "block_length"))
        if value is not None or (name in LOOP_PARAMETERS and overrides_loop):
            return value
        return getattr(self.model.generation_config, name)

    def _is_guided(self) -> bool:
        return self.guidance_model is not None and self._get_parameter("guidance_scale") != 0

    def _uses_bridge(self, sampler: str | None) -> bool:
        own = type(self.model.generation_config.sampler_config).__name__  # remote code has a class of its own
        own_bridge = self.generate_kwargs.get("gamma") is None and own == BridgeSamplerConfig.__name__
        return sampler == "bridge" or (sampler is None and own_bridge)

    def _get_gamma(self) -> float:
        gamma, own = self.generate_kwargs.get("gamma"), self.model.generation_config
        if gamma is None and own.sampler_config is not None:  # takes precedence over the model's `gamma`
            gamma = getattr(own.sampler_config, "gamma", 0)
        return float((own.gamma if gamma is None else gamma) or 0)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of each text, with padding."""
        return self._get_parameter("length") or self.model.config.max_position_embeddings

    @property
    def num_networks(self) -> int:
        """Number of networks that take each forward pass."""
        networks = [self.model, self.guidance_model] if self._is_guided() else [self.model]
        return sum(len(network.embeddings) for network in networks)

    def describe(self, sampler: str | None = None) -> dict[str, Any]:
        """Returns the parameters in effect that differ from the defaults, plus `gamma`, which is always included, even if 0."""
        values = {name: self._get_parameter(name) for name in GENERATION_PARAMETERS}
        values["timestep_grid"] = self.generate_kwargs.get("timestep_grid")
        is_bridge, is_guided = self._uses_bridge(sampler), self._is_guided()
        values |= {"sampler": "bridge", "gamma": None} if is_bridge else {"gamma": self._get_gamma()}
        values["guidance_model"] = self.guidance_model.name_or_path if is_guided else None
        values["guidance_scale"] = values["guidance_scale"] if is_guided else None
        defaults = {**self.model.generation_config._get_default_generation_params(), "temperature": 1.0, "top_p": 1.0}
        return _describe(self.model, values, {**defaults, "length": self.model.config.max_position_embeddings})

    def has_temperature(self, setting: Setting) -> bool:
        """Whether temperatures have an effect. The last step takes the most likely tokens, unless they are drawn or guided."""
        has_rounds = self._get_parameter("num_rounds") is not None
        return setting.num_steps != 1 or self._uses_bridge(setting.sampler) or self._is_guided() or has_rounds

    def columns(self, setting: Setting) -> dict[str, Any]:
        """Returns the leading columns of a setting's row: steps, sampler, temperature."""
        times = self.generate_kwargs.get("timestep_grid")
        num_steps = default_num_steps(self.model) if times is None else len(times) - 1
        return {"num_steps": num_steps, **setting.to_dict()}

    def _get_kwargs(self, setting: Setting) -> dict[str, Any]:
        kwargs = {**self.generate_kwargs, **setting.to_dict(), "guidance_model": self.guidance_model}
        sampler = kwargs.pop("sampler", None)
        if sampler == "bridge":
            kwargs |= {"sampler_config": BridgeSamplerConfig(), "gamma": None}
        elif sampler == "flow_map":  # also where the model has another sampler
            kwargs["gamma"] = self._get_gamma()
        return {name: value for name, value in kwargs.items() if value is not None}

    def warm_up(self, setting: Setting):
        """Takes one step: raises the errors of unusable parameters, and keeps one-time costs out of the timing."""
        generate_samples(self.model, [0], 0, **{**self._get_kwargs(setting), "num_steps": 1, "timestep_grid": None})

    def sample(self, setting: Setting, indices: Sequence[int], seed: int) -> list[Sample]:
        """Generates the samples with these indices in one batch."""
        kwargs = {**self._get_kwargs(setting), "batch_size": len(indices), "return_dict_in_generate": True}
        output = generate_samples(self.model, indices, seed, **kwargs)
        lengths = [self.num_tokens] * len(indices)
        if self._get_parameter("pad_after_eos"):
            own = self.model.generation_config
            lengths = lengths_up_to_eos(output.sequences, own.eos_token_id, own.bos_token_id).tolist()
        return list(map(Sample, output.sequences.tolist(), lengths, output.num_forward_passes.tolist()))

    def cpu(self):
        """Moves the networks to the CPU, to free the accelerator for the scorer."""
        self.model.cpu()
        if self.guidance_model is not None:
            self.guidance_model.cpu()


@dataclass
class CausalSource:
    """
    A causal language model as the source of texts: ancestral sampling, from its BOS token on. Texts have as many tokens as a
    flow-based model's, and like these continue after an EOS token unless `pad_after_eos`. A text depends on its seed and index
    only.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        length (`int`, *optional*): Number of new tokens of each text. By default the model's context.
        temperature (`float`, *optional*): Temperature.
        top_k (`int`, *optional*): Samples from the `top_k` most likely tokens only.
        top_p (`float`, *optional*): Samples from the smallest set of tokens whose probabilities reach `top_p`.
        pad_after_eos (`bool`, *optional*): Whether texts end at their first EOS token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    pad_after_eos: bool | None = None

    num_networks = 1

    @property
    def num_tokens(self) -> int:
        return self.length or _context(self.model)

    def describe(self, sampler: str | None = None) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "pad_after_eos")}
        values = {"sampler": "ancestral", "length": self.num_tokens, **values}
        return _describe(self.model, values, {"pad_after_eos": False})

    def has_temperature(self, setting: Setting) -> bool:
        return True

    def columns(self, setting: Setting) -> dict[str, Any]:
        return {"source": "ancestral", **setting.to_dict()}

    def warm_up(self, setting: Setting):
        self._sample(setting, [0], seed=0, num_tokens=1)

    def sample(self, setting: Setting, indices: Sequence[int], seed: int) -> list[Sample]:
        return self._sample(setting, indices, seed, self.num_tokens)

    def _sample(self, setting: Setting, indices: Sequence[int], seed: int, num_tokens: int) -> list[Sample]:
        bos, context, ends = find_bos_token(self.model, self.tokenizer), _context(self.model), None
        if bos is None:
            raise ValueError("`model` has no BOS token, which texts must begin with.")
        if self.num_tokens > context:
            raise ValueError(f"`length` is {self.num_tokens}, but the model reads {context} tokens.")
        if self.pad_after_eos:
            ends = find_eos_tokens(self.model, self.tokenizer)
            if not ends:
                raise ValueError("`pad_after_eos` needs an `eos_token_id` in the model's generation_config.json.")
        rows = generate_causal_samples(
            self.model,
            [[bos]] * len(indices),
            sample_generators(seed, indices),
            max_new_tokens=num_tokens,
            temperature=setting.temperature or self.temperature or 1.0,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token_id=ends,
        )
        return [Sample(tokens, len(tokens), len(tokens)) for tokens in rows]

    def cpu(self):
        self.model.cpu()


def _context(model: PreTrainedModel) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 1024


def _describe(model: PreTrainedModel, values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that are set and differ from their defaults, and the precision of the model."""
    values, defaults = {**values, "dtype": str(model.dtype).removeprefix("torch.")}, {**defaults, "dtype": "float32"}
    return {name: value for name, value in values.items() if value is not None and value != defaults.get(name)}


def is_flow_based(name: str, revision: str = "main") -> bool:
    """Whether the configuration of the model with this name, or in this folder, is from this library."""
    return isinstance(load_checked(AutoConfig, name, revision=revision), FLMConfig)


def load_source(
    name: str,
    revision: str = "main",
    guidance_model: str | None = None,
    guidance_revision: str = "main",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
    **generate_kwargs,
) -> FlowSource | CausalSource:
    """
    Loads a model as the source of texts.

    Args:
        name (`str`): Name of the model on the Hub, or its folder. Flow-based, or any causal language model.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit of the model.
        guidance_model (`str`, *optional*): Name or folder of a weaker model for autoguidance. For flow-based models.
        guidance_revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit of the guidance model.
        dtype (`str`, *optional*, defaults to `"auto"`): Precision of the weights.
        attn_implementation (`str`, *optional*): Attention implementation, such as `"sdpa"`.
        device (`str` or `torch.device`, *optional*): Device. By default an accelerator if there is one.
        generate_kwargs: Parameters of [`~FLMGenerationMixin.generate`], or fields of [`CausalSource`].

    Returns:
        [`FlowSource`] or [`CausalSource`]

    Raises:
        `OSError`: if there is no such model.
        `ValueError`: for parameters of flow-based models with a causal language model.
    """
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    auto_class = AutoModel if is_flow_based(name, revision) else AutoModelForCausalLM
    if auto_class is AutoModelForCausalLM:
        extra = {"guidance_model": guidance_model, **generate_kwargs}
        names = [key for key, value in extra.items() if value is not None and key not in CausalSource.__annotations__]
        if names:
            raise ValueError(f"`{'`, `'.join(names)}` do not apply to causal language models. Remove them.")
    model = load_checked(auto_class, name, revision=revision, **options).to(device).eval()
    tokenizer = load_checked(AutoTokenizer, name, revision=revision)
    if auto_class is AutoModelForCausalLM:
        return CausalSource(model, tokenizer, **generate_kwargs)
    guide = None
    if guidance_model is not None:
        guide = load_checked(AutoModel, guidance_model, revision=guidance_revision, **options).to(device).eval()
    return FlowSource(model, tokenizer, guide, generate_kwargs)
