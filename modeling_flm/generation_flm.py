# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Generation with flow-based language models: one sampler for every model that can denoise."""

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .flow import JointNoise, flow_map


logger = logging.get_logger(__name__)


def raise_recompile_limit():
    """Lets `torch.compile` keep as many graphs of one function as several networks, shapes and modes come to."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


class FLMGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~FLMGenerationMixin.generate`], saved in `generation_config.json`. `None` stands for the default of
    the model.

    Args:
        num_samples (`int`, *optional*, defaults to 1):
            The number of texts to generate.
        num_steps (`int`, *optional*, defaults to 64):
            The number of steps from noise to text, which is the number of forward passes.
        length (`int`, *optional*):
            The number of tokens of each text. The length that the model was trained for
            (`config.max_position_embeddings`) unless given.
        batch_size (`int`, *optional*, defaults to 64):
            The most texts that are generated at a time. It changes speed and memory, not the texts.
        temperature (`float`, *optional*):
            Divides the logits of every step. Below 1 texts become more likely and less diverse. Without effect where
            only the largest logit counts, which is at the last step.
        top_k (`int`, *optional*):
            Keeps the `top_k` most likely tokens of each position at every step.
        top_p (`float`, *optional*):
            Keeps the smallest set of tokens of each position whose probabilities reach `top_p`.
        output_drafts (`bool`, *optional*, defaults to `False`):
            Whether to return the most likely tokens of every step.
        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`FLMGenerationOutput`] rather than the tokens alone.
        bos_token_id (`int`, *optional*):
            The token that begins a text. Recorded for users of the model; the sampler does not need it.
        eos_token_id (`int` or `list[int]`, *optional*):
            The token that ends a text. Recorded, as above.
        pad_token_id (`int`, *optional*):
            The token that fills a text up. Recorded, as above.
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

    def _suggest(self, names) -> str:
        """The unknown `names`, each with the parameter that may have been meant."""
        known = [name for name in vars(self) if not name.startswith("_")]
        hints = []
        for name in names:
            close = difflib.get_close_matches(name, known, n=1)
            hints.append(f"`{name}`" + (f" (did you mean `{close[0]}`?)" if close else ""))
        return ", ".join(hints)

    def validate(self, **kwargs):
        """Raises a `ValueError` that names the parameter whose value cannot be used."""
        for name in ("num_samples", "num_steps", "length", "batch_size", "top_k"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.temperature is not None and not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise ValueError(f"`temperature` must be a number above 0, got {self.temperature!r}.")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must be a number above 0 and at most 1, got {self.top_p!r}.")

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {
            "num_samples": 1,
            "num_steps": 64,
            "batch_size": 64,
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
        drafts (`torch.LongTensor` of shape `(num_samples, num_steps, length)`, *optional*, returned when `output_drafts=True`):
            The most likely tokens at every step. The last draft is the text.
        num_forward_passes (`int`):
            How often the model was evaluated for each text.
    """

    sequences: torch.LongTensor | None = None
    drafts: torch.LongTensor | None = None
    num_forward_passes: int | None = None


class FLMGenerationMixin:
    """Gives a model with `state_embedding`, `time` and `denoise` its `generate()`."""

    output_modalities = ("text",)

    # What is kept from one call to the next: the factor of the noise with what identifies the embedding that it belongs
    # to, and the compiled step with its configuration.
    _noise_factor: tuple[torch.Tensor, torch.Tensor] | None = None
    _compiled_step: tuple[CompileConfig, Callable] | None = None

    @torch.no_grad()
    def generate(
        self,
        num_samples: int | None = None,
        num_steps: int | None = None,
        generation_config: FLMGenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prior_state: torch.Tensor | None = None,
        streamer: BaseStreamer | None = None,
        callback: Callable[[int, int, torch.LongTensor], None] | None = None,
        compile_config: CompileConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor | FLMGenerationOutput:
        r"""
        Generates texts from noise. On a uniform grid of reparameterized times from 0 to 1, the state is moved by the flow
        map \\(x \leftarrow X_{s,t}(x)\\) of the model; at the last step, where \\(t = 1\\) and \\(X_{s,1} = \delta_{s,1}\\),
        the most likely tokens are the text.

        Args:
            num_samples (`int`, *optional*):
                The number of texts.
            num_steps (`int`, *optional*):
                The number of steps, hence of forward passes.
            generation_config ([`FLMGenerationConfig`], *optional*):
                Parameters to use in the place of `model.generation_config`. Those that are `None` are taken from there.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of the noise, or one for each text. A CPU generator gives the same noise on every device. The
                global generator of the model's device unless given.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Applied to the logits of every step before temperature, top-k and top-p, as scores of shape
                `(num_tokens, vocab_size)` with an empty prefix.
            prior_state (`torch.Tensor` of shape `(num_samples, length, vocab_size)` or `(num_samples, length, embedding_size)`, *optional*):
                The noise to start from: Gaussian in one-hot space, from where it is projected by the embedding, or
                already a state (where both have the same size, it is taken for the former). Drawn unless given. It sets
                `num_samples` and `length`.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Is `put` the finished text, and before that the draft of every step if it has a `put_draft`, as
                [`~transformers.TextDiffusionStreamer`] does. For one text.
            callback (`Callable`, *optional*):
                Called as `callback(step, num_steps, tokens)` after every step, from 1 to `num_steps`, with the most
                likely tokens of the current batch, of shape `(batch_size, length)`.
            compile_config ([`~transformers.CompileConfig`], *optional*):
                Compiles a step, from one state to the next, as one graph with these arguments of `torch.compile`. The first
                calls take long; later ones with the same batch size and length are faster.
            kwargs:
                Further parameters of [`FLMGenerationConfig`], such as `length`, `batch_size` or `temperature`.

        Returns:
            `torch.LongTensor` of shape `(num_samples, length)`, or [`FLMGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            `ValueError`: if a parameter is unknown, or has a value that cannot be used.

        Example:

        ```python
        >>> model = AutoModel.from_pretrained("path/to/model", trust_remote_code=True)
        >>> tokens = model.generate(num_samples=8, num_steps=32, generator=torch.Generator().manual_seed(0))
        >>> texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ```
        """
        embedding = self.state_embedding.float()
        if num_samples is not None:
            kwargs["num_samples"] = num_samples
        if num_steps is not None:
            kwargs["num_steps"] = num_steps
        if prior_state is not None:
            self._check_prior_state(prior_state, embedding, kwargs)
            kwargs["num_samples"], kwargs["length"] = prior_state.shape[:2]
        config = self._prepare_generation_config(generation_config, kwargs)
        if streamer is not None and config.num_samples != 1:
            raise ValueError(f"`streamer` shows one text: pass `num_samples=1`, got {config.num_samples}.")
        if logits_processor is not None and not isinstance(logits_processor, list):
            raise ValueError("`logits_processor` must be a `LogitsProcessorList`; wrap a single processor into one.")

        if compile_config is not None and not isinstance(compile_config, CompileConfig):
            raise ValueError(f"`compile_config` must be a `CompileConfig`, got `{type(compile_config).__name__}`.")

        generators = generator if isinstance(generator, list) else [generator] * config.num_samples
        if len(generators) != config.num_samples:
            raise ValueError(
                f"`generator` has {len(generators)} generators for {config.num_samples} texts: pass as many."
            )

        factor = self._get_noise_factor(embedding) if prior_state is None else None
        processors = self._prepare_logits_processor(config, logits_processor)

        sequences, drafts = [], []
        progress = logging.tqdm(
            total=config.num_samples, desc="Generating", unit="text", disable=config.num_samples <= config.batch_size
        )
        if streamer is not None:
            streamer.put(torch.empty((1, 0), dtype=torch.long))  # streamers take what comes first for the prompt
        with progress:
            for start in range(0, config.num_samples, config.batch_size):
                size = min(config.batch_size, config.num_samples - start)
                # States are in float32 whatever precision the caller runs the model in.
                with torch.autocast(embedding.device.type, enabled=False):
                    if prior_state is None:
                        state = self._draw_noise(config.length, factor, generators[start : start + size])
                    else:
                        state = prior_state[start : start + size].to(embedding)
                        state = state @ embedding if state.shape[-1] == embedding.shape[0] else state
                tokens, batch_drafts = self._sample(
                    state, embedding, config, processors, streamer, callback, compile_config
                )
                sequences.append(tokens)
                drafts.append(batch_drafts)
                progress.update(size)

        sequences = torch.cat(sequences)
        if streamer is not None:
            streamer.put(sequences.cpu())
            streamer.end()
        if not config.return_dict_in_generate:
            return sequences
        return FLMGenerationOutput(
            sequences=sequences,
            drafts=torch.cat(drafts) if config.output_drafts else None,
            num_forward_passes=config.num_steps,
        )

    def _sample(
        self,
        state: torch.Tensor,
        embedding: torch.Tensor,
        config: FLMGenerationConfig,
        logits_processor: LogitsProcessorList,
        streamer: BaseStreamer | None,
        callback: Callable[[int, int, torch.LongTensor], None] | None,
        compile_config: CompileConfig | None,
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Moves a batch of states from noise to text."""
        put_draft = getattr(streamer, "put_draft", None)
        wants_drafts = config.output_drafts or put_draft is not None or callback is not None
        advance = type(self)._step if compile_config is None else self._get_compiled_step(compile_config)
        tau = torch.linspace(0, 1, config.num_steps + 1, device=state.device)
        t = self.time.tau_to_t(tau)
        # One time per sequence, for every point of the grid.
        tau, t = (times[:, None].expand(-1, state.shape[0]).contiguous() for times in (tau, t))

        drafts = []
        for step in range(config.num_steps):
            is_last = step == config.num_steps - 1
            if compile_config is not None:
                torch.compiler.cudagraph_mark_step_begin()
            times = (tau[step], tau[step + 1], t[step], t[step + 1])
            state, tokens = advance(
                self, state, *times, embedding, logits_processor, not is_last, is_last or wants_drafts
            )
            if compile_config is not None:  # a CUDA graph writes to the same place every time
                state, tokens = (None if x is None else x.clone() for x in (state, tokens))
            if put_draft is not None and not is_last:
                put_draft(tokens.cpu())
            if config.output_drafts:
                drafts.append(tokens)
            if callback is not None:
                callback(step + 1, config.num_steps, tokens)
        return tokens, torch.stack(drafts, dim=1) if drafts else None

    def _step(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor,
        s: torch.Tensor,
        t: torch.Tensor,
        embedding: torch.Tensor,
        logits_processor: LogitsProcessorList,
        with_state: bool,
        with_tokens: bool,
    ) -> tuple[torch.Tensor | None, torch.LongTensor | None]:
        """One step of the sampler: the next states, and the most likely tokens, where they are wanted."""
        tokens, expected = [], []
        for delta in self.denoise(state, tau_s, tau_t, logits_processor=logits_processor):
            if with_tokens:
                tokens.append(delta.argmax(dim=-1))
            if with_state:
                with torch.autocast(delta.device.type, enabled=False):
                    expected.append(delta @ embedding.to(delta.device))
        tokens = torch.cat(tokens, dim=1).to(state.device) if with_tokens else None
        if not with_state:
            return None, tokens
        return flow_map(state, torch.cat(expected, dim=1).to(state.device), s, t), tokens

    def _get_compiled_step(self, compile_config: CompileConfig) -> Callable:
        if self._compiled_step is None or self._compiled_step[0] != compile_config:
            raise_recompile_limit()  # each batch size has two graphs
            # The function and not the method, so that copies of the model do not call the original.
            compiled = torch.compile(type(self)._step, **compile_config.to_dict())
            self._compiled_step = (copy.copy(compile_config), compiled)
        return self._compiled_step[1]

    def _get_noise_factor(self, embedding: torch.Tensor) -> torch.Tensor:
        """The factor of the noise, made again only where the embedding has changed."""
        fingerprint = embedding.sum(dim=0)
        if self._noise_factor is None or not torch.equal(self._noise_factor[0].to(embedding.device), fingerprint):
            factor = JointNoise(embedding).factor(0)
            if not torch.isfinite(factor).all():
                raise ValueError("The token embedding of the model has values that are not finite.")
            self._noise_factor = (fingerprint, factor)
        return self._noise_factor[1].to(embedding.device)

    @staticmethod
    def _draw_noise(length: int, factor: torch.Tensor, generators: list[torch.Generator | None]) -> torch.Tensor:
        """States of pure noise, text by text so that how they are batched does not change them."""
        noise = []
        for generator in generators:
            device = factor.device if generator is None else generator.device
            noise.append(torch.randn(length, factor.shape[0], generator=generator, device=device))
        return torch.stack(noise).to(factor.device) @ factor

    @staticmethod
    def _check_prior_state(prior_state: torch.Tensor, embedding: torch.Tensor, kwargs: dict[str, Any]):
        sizes = tuple(embedding.shape)
        if prior_state.dim() != 3 or prior_state.shape[-1] not in sizes:
            raise ValueError(
                f"`prior_state` must have shape (num_samples, length, {sizes[0]} or {sizes[1]}), got "
                f"{tuple(prior_state.shape)}."
            )
        for name, size in zip(("num_samples", "length"), prior_state.shape):
            if kwargs.get(name, size) != size:
                raise ValueError(
                    f"`prior_state` of shape {tuple(prior_state.shape)} does not go with `{name}={kwargs[name]}`."
                )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> FLMGenerationConfig:
        """Parameters by precedence: arguments, `generation_config`, `self.generation_config`, defaults."""
        if generation_config is None:
            config = copy.deepcopy(self.generation_config)
        else:
            config = self._own_generation_config(generation_config)
        if unknown := [name for name in kwargs if name.startswith("_") or name not in vars(config)]:
            raise ValueError(f"`generate()` got unknown arguments: {config._suggest(unknown)}.")
        config.update(**kwargs)
        config.update(defaults_only=True, **self.generation_config.to_dict())
        config.update(defaults_only=True, **config._get_default_generation_params())
        max_length = self.config.max_position_embeddings
        config.update(defaults_only=True, length=max_length)
        if config.length > max_length:
            raise ValueError(
                f"`length` is {config.length}, but the model was made for at most {max_length} tokens "
                "(`config.max_position_embeddings`)."
            )
        return config

    def _own_generation_config(self, generation_config: GenerationConfig) -> FLMGenerationConfig:
        """A copy of what the user set, as the model's own class: code from a repository has another one than a package."""
        if not isinstance(generation_config, GenerationConfig):
            raise ValueError(
                f"`generation_config` must be a `{self.generation_config_class.__name__}`, got "
                f"`{type(generation_config).__name__}`."
            )
        return self.generation_config_class.from_dict(generation_config.to_diff_dict())

    @staticmethod
    def _prepare_logits_processor(
        config: FLMGenerationConfig, logits_processor: LogitsProcessorList | None
    ) -> LogitsProcessorList:
        """The user's processors, then temperature, top-k and top-p."""
        processors = LogitsProcessorList(logits_processor or [])
        if config.temperature is not None and config.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.top_k is not None:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            processors.append(TopPLogitsWarper(config.top_p))
        return processors

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained` to set `model.generation_config`."""
        if generation_config is not None:
            self.generation_config = self._own_generation_config(generation_config)
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                **kwargs,
            )
        except OSError:
            logger.info("No generation_config.json was found: `generate()` uses its defaults.")


__all__ = ["FLMGenerationConfig", "FLMGenerationMixin", "FLMGenerationOutput"]
