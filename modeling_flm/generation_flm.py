# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generation with flow-based language models: one sampler for every model that can denoise."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    CompileConfig,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
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
from transformers.utils import logging

from .configuration_flm import FLOW_MODEL_TYPES
from .flow import expand_times, reward_coefficient, times_with_known
from .generation_config_flm import (
    FLMGenerationConfig,
    FLMGenerationOutput,
    explicit_settings,
    own_generation_config,
    prepare_generation_config,
    set_sizes,
)
from .guidance_flm import Autoguidance, Reward, reward_gradient
from .joint_noise import JointNoise
from .known_tokens_flm import KnownTokens, check_known, is_after_eos, pad_after_eos, prepare_known
from .posterior_flm import first_probability, probability_of
from .sampling_flm import BlockByBlock, CommitRule, PosteriorRefinement, Sampler, StochasticFlowMapSamplerConfig
from .utils_flm import in_evaluation_mode, raise_recompile_limit


logger = logging.get_logger(__name__)


# Seconds before a batch shows its progress: most are finished by then.
_PROGRESS_DELAY = 2


def _progress(number: int, unit: str) -> Iterable[int]:
    """The steps or rounds of a batch, with a bar where they take long."""
    options = {"desc": f"{unit.capitalize()}s", "unit": unit, "delay": _PROGRESS_DELAY, "leave": None}
    return range(number) if number == 1 else logging.tqdm(range(number), **options)


# Processors that look at what has been written so far, which is nothing: all positions are written at once.
_NEEDS_PREFIX = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


def _needs_prefix(processor: Callable) -> bool:
    """Whether a processor does nothing, or a part of its work, because there is no prefix."""
    if isinstance(processor, SequenceBiasLogitsProcessor):  # also of bad words
        return any(len(sequence) > 1 for sequence in processor.sequence_bias)
    return isinstance(processor, _NEEDS_PREFIX)


class _TextStream:
    """What a streamer is shown of one text: tokens that stay, each once, and a draft of what comes after them."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer
        self.takes_drafts = hasattr(streamer, "put_draft")
        self.num_shown = 0
        streamer.put(torch.empty((1, 0), dtype=torch.long))  # streamers take what comes first for the prompt

    def show(self, tokens: torch.LongTensor, num_certain: int = 0):
        """Shows a text of which so many tokens from the beginning stay."""
        if num_certain > self.num_shown:
            self.streamer.put(tokens[:, self.num_shown : num_certain].cpu())
            self.num_shown = num_certain
        if self.takes_drafts and self.num_shown < tokens.shape[1]:
            self.streamer.put_draft(tokens[:, self.num_shown :].cpu())

    def end(self, tokens: torch.LongTensor):
        """Shows the rest of the finished text."""
        if self.num_shown < tokens.shape[1]:
            self.streamer.put(tokens[:, self.num_shown :].cpu())
        self.streamer.end()


@dataclass
class _Run:
    """What is common to all batches of a call of `generate`."""

    config: FLMGenerationConfig
    sampler: Sampler
    commitment: CommitRule
    model: "PreTrainedModel | Autoguidance"
    embedding: torch.Tensor
    factor: torch.Tensor | None  # of the noise, where any is drawn
    logits_processor: LogitsProcessorList
    reward: Reward | None
    output_drafts: bool
    stream: "_TextStream | None"
    callback: Callable[[int, int, torch.LongTensor], None] | None
    compile_config: CompileConfig | None
    # Whether what the model said was finite, batch by batch: looked at in the end, as that waits for the device.
    finite: list[torch.Tensor]


class FLMGenerationMixin:
    """Gives a model with `state_embedding`, `state_sizes`, `posterior` and `time_map` its `generate()`."""

    output_modalities = ("text",)

    # What is kept from one call to the next: the factor of the noise with what identifies the embedding that it belongs
    # to, and the compiled step with its configuration.
    _noise_factor: tuple[torch.Tensor, torch.Tensor] | None = None
    _compiled_step: tuple[CompileConfig, Callable] | None = None

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Not used: a `PeftModel` with `task_type="CAUSAL_LM"` looks for it before it hands `generate` on."""
        raise NotImplementedError("Tokens are not generated one after the other: call `generate`.")

    @torch.no_grad()
    @in_evaluation_mode
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        num_samples: int | None = None,
        num_steps: int | None = None,
        generation_config: FLMGenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prior_state: torch.Tensor | None = None,
        guidance_model: PreTrainedModel | None = None,
        reward: Reward | None = None,
        streamer: BaseStreamer | None = None,
        callback: Callable[[int, int, torch.LongTensor], None] | None = None,
        compile_config: CompileConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor | FLMGenerationOutput:
        r"""
        Generates texts from noise. On a grid of reparameterized times \\(\tau\\) from 0 to 1, by default a uniform one:

        1. Known tokens have the time 1, all others that of the grid. The state starts as noise, and clean where tokens are
           known.
        2. With a `reward`, the state is moved towards it.
        3. The model says what the text may be: the two-time denoiser \\(\delta\\), from the time of the state to the next one,
           or to where the sampler says.
        4. The sampler takes an estimate of the text from it: its mean, or tokens that it draws.
        5. The sampler moves the state to the next time, where it needs to with new noise. At the time 1 nothing moves.
        6. At the last step, the tokens that the sampler reads from \\(\delta\\) are the text: the most likely ones, or those
           that it draws.

        Known tokens (a prompt, or what surrounds an infill) are returned unchanged. Any model can complete them; one that was
        trained for it (`prompt_fraction`) needs fewer steps.

        With `num_rounds` (posterior refinement) or `block_length` (block by block), these steps are taken again and again, and
        the known tokens grow:

        a. Everything that is not known is written, in `num_steps` steps from noise.
        b. Some of it becomes known: tokens that are likely enough and the likeliest ones, or those of the next block.
        c. The rest goes back to noise. A text of which everything is known is finished.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_prompts, prompt_length)`, *optional*):
                What is known of the texts: how they begin, or with a `prompt_mask` tokens of any positions.
            num_samples (`int`, *optional*):
                The number of texts, a multiple of the number of prompts if there are some: all of the first prompt come
                first. By default one for each prompt.
            num_steps (`int`, *optional*):
                The number of steps, hence of forward passes (twice as many with a `reward`).
            generation_config ([`FLMGenerationConfig`], *optional*):
                Parameters to use in the place of `model.generation_config`. Those that are `None` are taken from there.
            attention_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
                With `input_ids` that texts begin with, 0 for padding on either side. Otherwise, of shape
                `(num_samples, length)` or that of the `prompt_mask`, 1 for the positions that there are, for models that were
                trained with padding: the others get `pad_token_id`.
            prompt_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
                1 where a token of `input_ids` is known, 0 where it is to be generated. By default all are known. With it,
                `length` is by default that of `input_ids`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of the noise, or one for each text: `torch.Generator().manual_seed(seed)` for a seed. By default the
                global generator of the model's device. A CPU generator gives the same noise on every device.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Applied to the logits of every step before temperature, top-k and top-p, as scores of shape
                `(num_tokens, vocab_size)` with an empty prefix, so that penalties of repetitions have no effect.
            prior_state (`torch.Tensor` of shape `(num_samples, length, vocab_size)` or `(num_samples, length, embedding_size)`, *optional*):
                The noise to start from: Gaussian in one-hot space, from where it is projected by the embedding, or
                already a state (where both have the same size, it is taken for the former). By default drawn. It sets
                `num_samples` and `length`. With a `guidance_model`, a state has that of the latter after its own.
            guidance_model ([`~transformers.PreTrainedModel`], *optional*):
                A worse version of the model to move away from (autoguidance), by `guidance_scale`: an earlier checkpoint, a
                smaller one or another average, over the same vocabulary.
            reward (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
                What to steer texts towards, by `reward_scale`: a differentiable function from soft tokens of shape
                `(batch_size, length, vocab_size)` to rewards of shape `(batch_size,)`, such as a [`ClassifierReward`]. It is
                shown the text that the state leads to at every step, which takes a further forward pass and a backward pass.
                With rounds or blocks, a batch has those texts only that are not finished.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Is `put` the finished text, and before that the draft of every step if it has a `put_draft`, as
                [`~transformers.TextDiffusionStreamer`] does. With rounds or blocks it is `put` how the text begins as far as
                that is known, and the rest of every round as a draft. For one text.
            callback (`Callable`, *optional*):
                Called as `callback(step, num_steps, tokens)` after every step, from 1 to `num_steps`, with the tokens of the
                current batch, of shape `(batch_size, length)`. With rounds or blocks it is called after each of them instead,
                also where there was nothing left to write.
            compile_config ([`~transformers.CompileConfig`], *optional*):
                Compiles a step, from one state to the next, as one graph with these arguments of `torch.compile`. The first
                calls take long; later ones with the same batch size and length are faster. `torch.compile(model)` compiles
                `forward`, which this does not call: pass `compile_config=CompileConfig()` instead.
            kwargs:
                Further parameters of [`FLMGenerationConfig`], such as `length`, `batch_size` or `temperature`.

        Returns:
            `torch.LongTensor` of shape `(num_samples, length)`, or [`FLMGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            `ValueError`: if a parameter is unknown, or has a value that cannot be used; or if what the model says is not
            finite, as after a training that diverged.

        Example:

        ```python
        >>> model = AutoModel.from_pretrained("path/to/model", trust_remote_code=True)
        >>> tokens = model.generate(num_samples=8, num_steps=32, generator=torch.Generator().manual_seed(0))
        >>> texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        >>> prompt = tokenizer(tokenizer.bos_token + "The cat", add_special_tokens=False, return_tensors="pt")
        >>> tokens = model.generate(**prompt, num_steps=32)
        ```
        """
        kwargs.pop("token_type_ids", None)  # which the tokenizer of BERT makes
        if num_samples is not None:
            kwargs["num_samples"] = num_samples
        if num_steps is not None:
            kwargs["num_steps"] = num_steps
        masks = check_known(input_ids, attention_mask, prompt_mask)
        self._check_types(generator, prior_state, streamer, callback)
        explicit = explicit_settings(generation_config, kwargs)
        set_sizes(kwargs, explicit, input_ids, masks, prior_state)
        config = prepare_generation_config(
            generation_config, kwargs, explicit, self.generation_config, self.config.max_position_embeddings
        )
        if streamer is not None and config.num_samples != 1:
            raise ValueError(f"`streamer` shows one text: pass `num_samples=1`, got {config.num_samples}.")
        if logits_processor is not None and not isinstance(logits_processor, list):
            raise ValueError("`logits_processor` must be a `LogitsProcessorList`; wrap a single processor into one.")
        if compile_config is not None and not isinstance(compile_config, CompileConfig):
            raise ValueError(f"`compile_config` must be a `CompileConfig`, got `{type(compile_config).__name__}`.")
        if config.pad_after_eos and config.eos_token_id is None:
            raise ValueError("`pad_after_eos` needs an `eos_token_id`.")
        generators = generator if isinstance(generator, list) else [generator] * config.num_samples
        if len(generators) != config.num_samples:
            raise ValueError(
                f"`generator` has {len(generators)} generators for {config.num_samples} texts: pass as many."
            )

        model = self._get_guided_model(guidance_model, config, explicit)
        embedding = model.state_embedding.float()
        if prior_state is not None:
            self._check_prior_state(prior_state, embedding, kwargs)
        sampler = self._get_sampler(config, explicit)
        commitment = self._get_commitment(config, explicit)
        reward = self._check_reward(reward, config, explicit)
        is_softmax = model is self and len(self.state_sizes) == 1
        reads_more = sampler.draws_tokens or commitment.reads_probabilities or reward is not None
        self._warn_of_no_effect(config, explicit, logits_processor, only_argmax=is_softmax and not reads_more)
        if compile_config is None:
            self._warn_of_compiled_forward()
        if reward is not None and not sampler.takes_rewards:
            raise ValueError(
                f"`reward` does not go with `{type(sampler).__name__}`, whose steps draw tokens: leave out `sampler_config`."
            )
        needs_noise = prior_state is None or sampler.draws_noise or commitment.draws_noise or reward is not None
        run = _Run(
            config=config,
            sampler=sampler,
            commitment=commitment,
            model=model,
            embedding=embedding,
            factor=self._get_noise_factor(embedding, model.state_sizes) if needs_noise else None,
            logits_processor=self._prepare_logits_processor(config, logits_processor),
            reward=reward,
            output_drafts=config.output_drafts,
            stream=None if streamer is None else _TextStream(streamer),
            callback=callback,
            compile_config=compile_config,
            finite=[],
        )
        known = prepare_known(input_ids, *masks, config, self.config.vocab_size, embedding.device)

        results = []
        progress = logging.tqdm(
            total=config.num_samples, desc="Generating", unit="text", disable=config.num_samples <= config.batch_size
        )
        with progress:
            for start in range(0, config.num_samples, config.batch_size):
                rows = slice(start, min(start + config.batch_size, config.num_samples))
                # States are in float32 whatever precision the caller runs the model in.
                with torch.autocast(embedding.device.type, enabled=False):
                    state, fresh_generators = self._draw_states(run, generators[rows], prior_state is None)
                    if prior_state is not None:
                        state = prior_state[rows].to(embedding)
                        state = state @ embedding if state.shape[-1] == embedding.shape[0] else state
                results.append(self._write(run, state, known[rows], fresh_generators))
                progress.update(rows.stop - rows.start)

        if not torch.compiler.is_compiling() and not torch.stack(run.finite).all():
            raise ValueError(
                "What the model says is not finite, so that there is no text: its weights are not, as after a training that "
                f"diverged, or they are too large for {self.dtype}."
            )
        sequences, drafts, num_forward_passes, commit_rounds = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*results)
        )
        if config.pad_after_eos:
            sequences = pad_after_eos(sequences, known, config)
        if run.stream is not None:
            run.stream.end(sequences)
        if not config.return_dict_in_generate:
            return sequences
        return FLMGenerationOutput(sequences, drafts, num_forward_passes, commit_rounds)

    def _write(
        self, run: _Run, state: torch.Tensor, known: KnownTokens, generators: list[torch.Generator]
    ) -> tuple[torch.LongTensor, torch.LongTensor | None, torch.LongTensor, torch.LongTensor | None]:
        """
        The loop around the sampler, in the steps that the docstring of `generate` names by letters. `state` is noise, and
        `generators` draw what is random on the way. Returns the texts, their drafts, what they cost, and when they were known.
        """
        config, commitment, prompt = run.config, run.commitment, known
        cost = config.num_steps * (1 if run.reward is None else 2)
        if commitment.num_rounds is None:
            tokens, _, drafts = self._sample(run, state, known, generators)
            return tokens, drafts, torch.full((len(state),), cost, device=state.device), None

        # Streamers, callbacks and drafts are told of rounds, in which finished texts are still there.
        inner = replace(run, output_drafts=False, stream=None, callback=None)
        state, tokens, drafts = state.clone(), known.tokens.clone(), []
        commit_rounds, num_passes = torch.zeros_like(tokens), torch.zeros_like(tokens[:, 0])
        for round in _progress(commitment.num_rounds, "round"):
            is_open = known.is_open
            rows = commitment.due(round, is_open).any(dim=1).nonzero().flatten()
            if len(rows) > 0:
                # a. What is not known is written
                own_generators = [generators[row] for row in rows.tolist()] if generators else []
                if round > 0 and commitment.draws_noise:
                    state[rows] = self._draw_noise(state.shape[1], run.factor, own_generators)
                tokens[rows], probabilities = self._sample_rows(inner, state, known, rows, own_generators)
                num_passes[rows] += cost
                # b. Some of it becomes known
                chosen = torch.zeros_like(is_open)
                chosen[rows] = commitment.commit(round, probabilities, is_open[rows])
                if config.pad_after_eos:  # what comes after a known end is as good as known
                    written = prompt.is_open & (chosen | ~is_open)
                    chosen |= is_open & is_after_eos(tokens, written, config)
                commit_rounds[chosen] = round + 1
                known = known.commit(tokens, chosen)
                # c. The rest starts from noise again
                if run.stream is not None:
                    certain = pad_after_eos(tokens, prompt, config) if config.pad_after_eos else tokens
                    run.stream.show(certain, num_certain=int((~known.is_open).long().cumprod(dim=1).sum()))
            if run.output_drafts:
                drafts.append(tokens.clone())
            if run.callback is not None:
                run.callback(round + 1, commitment.num_rounds, tokens.clone())
        drafts = torch.stack(drafts, dim=1) if run.output_drafts else None
        return known.tokens, drafts, num_passes, commit_rounds

    def _sample_rows(
        self, run: _Run, state: torch.Tensor, known: KnownTokens, rows: torch.Tensor, generators: list[torch.Generator]
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Writes some of the texts of a batch: their tokens, and how likely these are if anybody asks."""
        num_rows = len(rows)
        if run.compile_config is not None:  # a step is compiled for a number of texts
            rows = torch.cat([rows, rows[:1].expand(len(state) - num_rows)])
            generators = generators + [
                torch.Generator(each.device) for each in generators[:1] * (len(rows) - num_rows)
            ]
        tokens, probabilities, _ = self._sample(run, state[rows], known[rows], generators)
        return tokens[:num_rows], None if probabilities is None else probabilities[:num_rows]

    def _sample(
        self, run: _Run, state: torch.Tensor, known: KnownTokens, fresh_generators: list[torch.Generator] | None
    ) -> tuple[torch.LongTensor, torch.Tensor | None, torch.LongTensor | None]:
        """
        The sampler: moves a batch of states from noise to text, in the steps that the docstring of `generate` numbers.
        `fresh_generators` draw what is random on the way. Returns tokens, how likely they are if anybody asks, and drafts.
        """
        config, sampler, compile_config, embedding = run.config, run.sampler, run.compile_config, run.embedding
        shows_drafts = run.stream is not None and run.stream.takes_drafts
        wants_drafts = run.output_drafts or shows_drafts or run.callback is not None
        advance = self._step if compile_config is None else self._get_compiled_step(compile_config)
        if config.timestep_grid is None:
            tau = torch.linspace(0, 1, config.num_steps + 1, device=state.device)
        else:
            tau = torch.tensor(config.timestep_grid, dtype=torch.float32, device=state.device)
        t = self.time_map.tau_to_t(tau)
        target_tau = sampler.target_tau(tau[:-1], tau[1:], self.time_map)

        # 1. Known tokens have the time 1, and a clean state
        state = known.start(state, embedding)
        drafts = []
        for step in _progress(config.num_steps, "step"):
            is_last = step == config.num_steps - 1
            times = self._times(known, len(state), tau[step], target_tau[step], t[step], t[step + 1])
            # 2. Towards the reward
            if run.reward is not None:
                state = self._steer_by_reward(run, state, known, times, is_first=step == 0)
            # 3. to 6.
            uniforms = self._draw_uniforms(state, fresh_generators) if sampler.draws_tokens else None
            noise = None
            if sampler.draws_noise and not is_last:
                noise = self._draw_noise(state.shape[1], run.factor, fresh_generators)
            if compile_config is not None:
                torch.compiler.cudagraph_mark_step_begin()
            state, tokens, probabilities = advance(
                run.model,
                sampler,
                state,
                times,
                embedding,
                known.attention_mask,
                run.logits_processor,
                uniforms,
                noise,
                is_last=is_last,
                with_tokens=wants_drafts,
                with_probabilities=run.commitment.reads_probabilities,
            )
            if compile_config is not None:  # a CUDA graph writes to the same place every time
                state, tokens, probabilities = (
                    None if x is None else x.clone() for x in (state, tokens, probabilities)
                )
            tokens = None if tokens is None else known.complete(tokens)
            if shows_drafts and not is_last:
                run.stream.show(tokens)
            if run.output_drafts:
                drafts.append(tokens)
            if run.callback is not None:
                run.callback(step + 1, config.num_steps, tokens)
        run.finite.append((torch.isfinite(probabilities) | ~known.is_open).all())
        return tokens, probabilities, torch.stack(drafts, dim=1) if drafts else None

    @staticmethod
    def _times(known: KnownTokens, batch_size: int, *grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Times of the grid for every text, or where something is known, for every token."""
        return tuple(times_with_known(time.repeat(batch_size), known.mask) for time in grid)

    @staticmethod
    def _step(
        model: "PreTrainedModel | Autoguidance",
        sampler: Sampler,
        state: torch.Tensor,
        times: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        embedding: torch.Tensor,
        attention_mask: torch.Tensor | None,
        logits_processor: LogitsProcessorList,
        uniforms: torch.Tensor | None,
        noise: torch.Tensor | None,
        is_last: bool,
        with_tokens: bool,
        with_probabilities: bool,
    ) -> tuple[torch.Tensor | None, torch.LongTensor | None, torch.Tensor | None]:
        """
        Steps 3 to 6: the next state, with tokens where they are wanted; or if `is_last` the text, with its probabilities, or
        others that tell as well whether they are finite.
        """
        tau_s, target_tau, s, t = times
        # 3. What the text may be
        posterior = model.posterior(state, tau_s, target_tau, attention_mask, logits_processor)
        # 6. The text
        if is_last:
            read_tokens = sampler.read_tokens(uniforms)
            # A state that is not finite is none to the end, and no softmax of what is not finite has a finite entry.
            tokens, probabilities = posterior.read(
                read_tokens, probability_of(read_tokens) if with_probabilities else first_probability
            )
            return None, tokens, probabilities
        # 4. An estimate of the text
        estimate, tokens = sampler.estimate(posterior, embedding, uniforms, with_tokens)
        # 5. The state at the next time
        return sampler.move(state, estimate, s, t, noise), tokens, None

    def _steer_by_reward(
        self, run: _Run, state: torch.Tensor, known: KnownTokens, times: tuple[torch.Tensor, ...], is_first: bool
    ) -> torch.Tensor:
        r"""
        The state moved towards the reward, \\(x \leftarrow x + \eta\,\frac{(1-s)(t-s)}{t}\,\nabla_x r(\delta)\\).

        In many short steps this is the flow of the texts that are more likely by the factor \\(e^{\eta\,r}\\), to first order
        in \\(\eta\\): it differs by \\(\eta\,\frac{1-s}{s}\,\nabla_x r(D_s(x))\\). At the start \\(D_0\\) does not depend on
        the noise, and the reward is that of \\(\delta_{0,1}\\): the mean of the noise with the density \\(e^{\eta\,r}\\)
        relative to the normal one moves by \\(\eta\,\nabla_x r\\), as far as the reward is linear in the noise.
        """
        tau_s, _, s, t = times
        size = sum(self.state_sizes)  # the rest is the state of a guidance model
        tau_end = torch.ones_like(tau_s) if is_first else tau_s

        def look_ahead(state: torch.Tensor) -> torch.Tensor:
            state = state[..., :size]
            posterior = self.posterior(state, tau_s, tau_end, known.attention_mask, run.logits_processor)
            return known.complete_soft(posterior.dense())

        gradient = reward_gradient(run.reward, look_ahead, state)
        # In one-hot space the gradient is `gradient @ E.T`: this is how the state moves with it.
        with torch.autocast(state.device.type, enabled=False):
            direction = (gradient @ run.factor.T) @ run.factor
        return state + expand_times(run.config.reward_scale * reward_coefficient(s, t), state) * direction

    def _get_compiled_step(self, compile_config: CompileConfig) -> Callable:
        if self._compiled_step is None or self._compiled_step[0] != compile_config:
            raise_recompile_limit()  # each batch size has two graphs
            compiled = torch.compile(self._step, **compile_config.to_dict())
            self._compiled_step = (copy.copy(compile_config), compiled)
        return self._compiled_step[1]

    @staticmethod
    def _get_sampler(config: FLMGenerationConfig, explicit: dict[str, Any]) -> Sampler:
        """The sampler that was asked for last: of this call, or the model's own; `gamma` is short for one."""
        if explicit.get("sampler_config") is not None:
            if explicit.get("gamma"):
                raise ValueError(
                    f"`gamma={config.gamma}` does not go with a `sampler_config`: leave it out, or pass "
                    f"`StochasticFlowMapSamplerConfig(gamma={config.gamma})`."
                )
            return config.sampler_config.build()
        if explicit.get("gamma") is not None or config.sampler_config is None:
            return StochasticFlowMapSamplerConfig(config.gamma or 0.0).build()
        return config.sampler_config.build()

    @staticmethod
    def _get_commitment(config: FLMGenerationConfig, explicit: dict[str, Any]) -> CommitRule:
        """The loop around the sampler that was asked for last: by this call, or by the model's own configuration."""
        wants_rounds, wants_blocks = (explicit.get(name) is not None for name in ("num_rounds", "block_length"))
        if wants_rounds and wants_blocks:
            raise ValueError("`num_rounds` does not go with `block_length`: leave one of them out.")
        has_rounds = config.num_rounds is not None and not wants_blocks
        has_blocks = config.block_length is not None and not has_rounds
        for name in ("commit_threshold", "commit_budget"):
            if explicit.get(name) is not None and not has_rounds:
                raise ValueError(f"`{name}={explicit[name]!r}` needs `num_rounds`, such as 4.")
        if explicit.get("fresh_noise") is not None and not (has_rounds or has_blocks):
            raise ValueError(f"`fresh_noise={config.fresh_noise}` needs `num_rounds` or `block_length`.")
        if has_rounds:
            threshold, budget = config.commit_threshold, config.commit_budget
            return PosteriorRefinement(config.num_rounds, threshold, budget, config.fresh_noise)
        if has_blocks:
            return BlockByBlock(config.block_length, config.length, config.fresh_noise)
        return CommitRule()

    def _get_guided_model(
        self, guidance_model: PreTrainedModel | None, config: FLMGenerationConfig, explicit: dict[str, Any]
    ) -> "PreTrainedModel | Autoguidance":
        if guidance_model is None:
            if explicit.get("guidance_scale"):  # not of the model's own, for which other calls have no model
                raise ValueError(f"`guidance_scale={config.guidance_scale}` needs a `guidance_model`.")
            return self
        if config.guidance_scale is None:
            raise ValueError("`guidance_model` needs a `guidance_scale`, such as 1.0.")
        model_type = guidance_model.config.model_type if isinstance(guidance_model, PreTrainedModel) else None
        if model_type not in FLOW_MODEL_TYPES:
            raise ValueError(
                f"`guidance_model` must be a flow-based language model, got `{type(guidance_model).__name__}`."
            )
        if guidance_model.config.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"`guidance_model` has {guidance_model.config.vocab_size} tokens, but the model has "
                f"{self.config.vocab_size}: pass one with the same tokenizer."
            )
        return self if config.guidance_scale == 0 else Autoguidance(self, guidance_model, config.guidance_scale)

    @staticmethod
    def _check_reward(reward: Reward | None, config: FLMGenerationConfig, explicit: dict[str, Any]) -> Reward | None:
        """The reward, if it counts."""
        if reward is None:
            if explicit.get("reward_scale"):
                raise ValueError(f"`reward_scale={config.reward_scale}` needs a `reward`.")
            return None
        if not callable(reward) or isinstance(reward, PreTrainedModel):
            raise ValueError(
                f"`reward` must be a function of soft tokens, such as a `ClassifierReward`, got `{type(reward).__name__}`."
            )
        if config.reward_scale is None:
            raise ValueError("`reward` needs a `reward_scale`, such as 1.0.")
        return reward if config.reward_scale != 0 else None

    @staticmethod
    def _check_types(generator: Any, prior_state: Any, streamer: Any, callback: Any):
        """Raises a `ValueError` where one of these is something else."""
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(
                f"`generator` must be a `torch.Generator`, or a list of one for each text, got {generator!r}. For a seed pass "
                "`torch.Generator().manual_seed(seed)`."
            )
        if prior_state is not None and not isinstance(prior_state, torch.Tensor):
            raise ValueError(f"`prior_state` must be a tensor, got `{type(prior_state).__name__}`.")
        if streamer is not None and not isinstance(streamer, BaseStreamer):
            raise ValueError(
                f"`streamer` must be a streamer, such as `TextDiffusionStreamer(tokenizer)`, got {streamer!r}."
            )
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback` must be a function of step, num_steps and tokens, got {callback!r}.")

    @staticmethod
    def _warn_of_no_effect(
        config: FLMGenerationConfig,
        explicit: dict[str, Any],
        logits_processor: LogitsProcessorList | None,
        only_argmax: bool,
    ):
        """Warns of what this call is passed without effect; `only_argmax` if the last step reads nothing else of the logits."""
        neutral = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
        names = [name for name, value in neutral.items() if explicit.get(name, value) != value]
        if names and config.num_steps == 1 and only_argmax:
            logger.warning_once(
                f"`{'`, `'.join(names)}` {'has' if len(names) == 1 else 'have'} no effect in one step, which takes the most likely "
                "tokens: take more steps, or draw tokens with `sampler_config=BridgeSamplerConfig()`."
            )
        if explicit.get("gamma") and config.num_steps == 1:
            logger.warning_once("`gamma` has no effect in one step: take more steps.")
        if names := sorted({type(each).__name__ for each in logits_processor or [] if _needs_prefix(each)}):
            logger.warning_once(
                f"`{'`, `'.join(names)}` looks at tokens that were written before, but all tokens are written at once: it has "
                "no effect, but on single tokens."
            )

    def _warn_of_compiled_forward(self):
        """Warns where `forward` was compiled, which the sampler does not go through."""
        is_compiled = getattr(vars(self).get("forward"), "_torchdynamo_orig_callable", None) is not None
        if self._compiled_call_impl is not None or is_compiled:
            logger.warning_once(
                "The compiled `forward` is not what `generate()` runs: pass `compile_config=CompileConfig()` to compile its "
                "steps, or call `model.compile_regions()`."
            )

    def _get_noise_factor(self, embedding: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The factor of the noise, made again only where the embedding has changed."""
        fingerprint = embedding.sum(dim=0)
        known = None if self._noise_factor is None else self._noise_factor[0].to(embedding.device)
        if known is None or not torch.equal(known, fingerprint):
            noise = JointNoise(*embedding.split(sizes, dim=1))
            factor = torch.cat([noise.factor(index) for index in range(len(sizes))], dim=1)
            if not torch.isfinite(factor).all():
                raise ValueError("The token embedding of the model has values that are not finite.")
            self._noise_factor = (fingerprint, factor)
        return self._noise_factor[1].to(embedding.device)

    def _draw_states(
        self, run: _Run, generators: list[torch.Generator | None], from_noise: bool
    ) -> tuple[torch.Tensor | None, list[torch.Generator] | None]:
        """
        States of pure noise, and generators for what is drawn later, text by text so that how they are batched does not
        change them.
        """
        states, fresh_generators = [], []
        for generator in generators:
            if from_noise:
                states.append(self._draw_noise(run.config.length, run.factor, [generator]))
            if run.sampler.draws_noise or run.sampler.draws_tokens or run.commitment.draws_noise:
                device = run.embedding.device if generator is None else generator.device
                seed = torch.randint(2**62, (), generator=generator, device=device)
                fresh_generators.append(torch.Generator(device).manual_seed(int(seed)))
        return torch.cat(states) if states else None, fresh_generators

    @staticmethod
    def _draw_noise(length: int, factor: torch.Tensor, generators: list[torch.Generator | None]) -> torch.Tensor:
        """States of pure noise."""
        noise = []
        for generator in generators:
            device = factor.device if generator is None else generator.device
            noise.append(torch.randn(length, factor.shape[0], generator=generator, device=device))
        with torch.autocast(factor.device.type, enabled=False):
            return torch.stack(noise).to(factor.device) @ factor

    @staticmethod
    def _draw_uniforms(state: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """A uniform variable for each token."""
        uniforms = [torch.rand(state.shape[1], generator=each, device=each.device) for each in generators]
        return torch.stack(uniforms).to(state.device)

    @staticmethod
    def _check_prior_state(prior_state: torch.Tensor, embedding: torch.Tensor, kwargs: dict[str, Any]):
        sizes = tuple(embedding.shape)
        if prior_state.dim() != 3 or prior_state.shape[-1] not in sizes:
            raise ValueError(
                f"`prior_state` must have shape (num_samples, length, {sizes[0]} or {sizes[1]}), got "
                f"{tuple(prior_state.shape)}."
            )
        if not torch.compiler.is_compiling() and not torch.isfinite(prior_state).all():
            raise ValueError("`prior_state` has values that are not finite.")
        for name, size in zip(("num_samples", "length"), prior_state.shape):
            if kwargs.get(name, size) != size:
                raise ValueError(
                    f"`prior_state` of shape {tuple(prior_state.shape)} does not go with `{name}={kwargs[name]}`."
                )

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
            self.generation_config = own_generation_config(generation_config)
            return
        # What else is there is for the configuration of the model.
        kwargs = {name: value for name, value in kwargs.items() if name in vars(self.generation_config)}
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


__all__ = ["FLMGenerationMixin"]
