# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generation with flow-based language models: the loop of rounds, the loop of steps, and a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import CompileConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .flow import expand_times, reward_coefficient, times_with_known
from .generation_config_flm import (
    FLMGenerationConfig,
    FLMGenerationOutput,
    as_flm_generation_config,
    build_commit_rule,
    build_logits_processor,
    build_stopping_rule,
    check_types,
    load_generation_config,
    resolve_generation_config,
    warn_about_compiled_forward,
    warn_about_no_effect,
)
from .guidance_flm import Autoguidance, Reward, add_guidance, check_reward, steer_by_reward
from .known_tokens_flm import KnownTokens, Prompts, is_after_eos, pad_after_eos
from .posterior_flm import entropy, first_probability, mean_embedding, probability_of
from .randomness_flm import NoiseSource, Randomness, check_state, get_noise_factor
from .sampling_flm import CommitRule, Sampler, StoppingRule
from .utils_flm import in_evaluation_mode, progress, raise_recompile_limit


class _TextStream:
    """Passes a sample to a streamer: final tokens once each, followed by a draft of the rest."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer
        self.takes_drafts = hasattr(streamer, "put_draft")
        self.num_shown = 0
        streamer.put(torch.empty((1, 0), dtype=torch.long))  # streamers take the first value for the prompt

    def show(self, tokens: torch.LongTensor, num_final: int = 0):
        """Streams tokens of shape `(1, length)`, where the first `num_final` no longer change."""
        if num_final > self.num_shown:
            self.streamer.put(tokens[:, self.num_shown : num_final].cpu())
            self.num_shown = num_final
        if self.takes_drafts and self.num_shown < tokens.shape[1]:
            self.streamer.put_draft(tokens[:, self.num_shown :].cpu())

    def end(self, tokens: torch.LongTensor):
        """Streams the rest of the finished sample."""
        if self.num_shown < tokens.shape[1]:
            self.streamer.put(tokens[:, self.num_shown :].cpu())
        self.streamer.end()


@dataclass
class _Call:
    """What all batches of a call of `generate` have in common."""

    config: FLMGenerationConfig
    sampler: Sampler
    rule: CommitRule
    stopping: StoppingRule | None
    model: PreTrainedModel | Autoguidance
    embedding: torch.Tensor
    factor: torch.Tensor | None  # of the noise; `None` if it is not needed
    logits_processor: LogitsProcessorList
    reward: Reward | None
    output_drafts: bool
    stream: _TextStream | None
    callback: Callable[[int, int, torch.LongTensor], None] | None
    compile_config: CompileConfig | None
    # For each batch, whether the model's outputs are finite. Checked at the end, since reading it waits for the device.
    finite: list[torch.Tensor]


class _Times(NamedTuple):
    """Times of a step, each of shape `(batch_size,)` or, with known tokens, `(batch_size, length)`."""

    tau_s: torch.Tensor  # reparameterized time of the state
    target_tau: torch.Tensor  # reparameterized time that the model is evaluated for
    s: torch.Tensor  # interpolant time of the state
    t: torch.Tensor  # interpolant time after the step


class _StepOutput(NamedTuple):
    """Result of a step. At the last step there is no state and no estimate, and at the others there are no probabilities."""

    state: torch.Tensor | None
    estimate: torch.Tensor | None  # of the text, for self-conditioning
    tokens: torch.LongTensor | None
    probabilities: torch.Tensor | None
    entropies: torch.Tensor | None = None  # if there is a stopping rule


class _Samples(NamedTuple):
    """Result of the loop of steps. `probabilities` belong to `tokens` if the commit rule reads them; else they only show whether all is finite."""

    tokens: torch.LongTensor
    probabilities: torch.Tensor
    drafts: torch.LongTensor | None
    num_steps: torch.LongTensor  # of each text


class _SettlingTexts:
    """
    Tokens of all texts of a batch, while fewer and fewer are generated on.

    Args:
        rule ([`StoppingRule`]): When a text is settled.
        tokens (`torch.LongTensor` of shape `(batch_size, length)`): Where to keep the tokens.
    """

    def __init__(self, rule: StoppingRule, tokens: torch.LongTensor):
        self.rule, self.tokens = rule, torch.full_like(tokens, -1)
        self.num_steps = torch.zeros_like(tokens[:, 0])
        self.rows = torch.arange(len(tokens), device=tokens.device)  # the texts that are generated on
        self.num_same = torch.zeros_like(self.rows)

    def update(
        self, tokens: torch.LongTensor, entropies: torch.Tensor | None, is_open: torch.BoolTensor
    ) -> torch.LongTensor:
        """Takes the tokens of a step, and returns which of these texts to go on with: none after the last step, without entropies."""
        is_same = (tokens == self.tokens[self.rows]).all(dim=1)
        self.num_same = torch.where(is_same, self.num_same + 1, 0)
        self.tokens[self.rows] = tokens
        self.num_steps[self.rows] += 1
        if entropies is None:
            return self.rows[:0]
        (rest,) = (~self.rule.is_settled(self.num_same, entropies, is_open)).nonzero(as_tuple=True)
        self.rows, self.num_same = self.rows[rest], self.num_same[rest]
        return rest


class FLMGenerationMixin:
    """Adds `generate()` to a model that defines `state_embedding`, `state_sizes`, `posterior` and `time_map`."""

    output_modalities = ("text",)

    # Cached between calls: the factor of the noise with a fingerprint of its embedding, and the compiled step with its
    # configuration.
    _noise_factor: tuple[torch.Tensor, torch.Tensor] | None = None
    _compiled_step: tuple[CompileConfig, Callable] | None = None

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Not used, but a `PeftModel` with `task_type="CAUSAL_LM"` requires it."""
        raise NotImplementedError("Tokens are generated in parallel: call `generate`.")

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
        noise_source: NoiseSource | None = None,
        guidance_model: PreTrainedModel | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        reward: Reward | None = None,
        streamer: BaseStreamer | None = None,
        callback: Callable[[int, int, torch.LongTensor], None] | None = None,
        compile_config: CompileConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor | FLMGenerationOutput:
        r"""
        Generates sequences from noise. On a grid of reparameterized times \\(\tau\\) from 0 to 1, evenly spaced by default:

        1. Known tokens get the time 1, all others the time of the grid. The state starts as noise, and clean at known tokens.
        2. With a `reward`, the state moves along the gradient of the reward.
        3. The model predicts the posterior of the clean tokens: the two-time denoiser \\(\delta\\), from the time of the state
           to the next time, or to the time that the sampler chooses. With self-conditioning it also reads its estimate of the
           text at the step before, and may repeat this (`num_fixed_point_iterations`).
        4. The sampler estimates the text from it: the posterior mean, or drawn tokens.
        5. The sampler moves the state to the next time, some samplers with new noise. Known tokens do not move.
        6. At the last step, the sampler reads the tokens from \\(\delta\\): the most likely tokens, or drawn ones.

        Known tokens (a prompt, or the context of a gap) are returned unchanged. Any model can complete them; a model that was
        trained for it (`prompt_fraction`) needs fewer steps.

        With `num_rounds` (posterior refinement) or `block_length` (block by block), these steps are repeated while the set of
        known tokens grows. Each round:

        a. generates all unknown tokens, in `num_steps` steps from noise;
        b. commits some of them: the most likely tokens, or the tokens of the next block;
        c. returns the others to noise. A sequence without unknown tokens is finished.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_prompts, prompt_length)`, *optional*):
                Known tokens: prompts, or with a `prompt_mask` tokens at any positions.
            num_samples (`int`, *optional*):
                Number of samples in all, a multiple of the number of prompts; all samples of the first prompt come first. By
                default one for each prompt.
            num_steps (`int`, *optional*):
                Number of steps, hence of forward passes (twice as many with a `reward`).
            generation_config ([`FLMGenerationConfig`], *optional*):
                Parameters that override `model.generation_config`, except those that are `None`.
            attention_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
                For prompts, 0 for padding on either side. Otherwise, of shape `(num_samples, length)` or the shape of the
                `prompt_mask`: 1 for the positions of each sequence, 0 for padding, for models trained with padding. Padding
                gets `pad_token_id`.
            prompt_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
                1 where a token of `input_ids` is known, 0 where it is to be generated. By default all are known. With a
                `prompt_mask`, `length` is by default the length of `input_ids`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of all random numbers, or one for each sample: `torch.Generator().manual_seed(seed)` for a seed. By
                default the global generator of the model's device. A CPU generator gives the same noise on every device.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Applied to the logits of every step before temperature, top-k and top-p, as scores of shape
                `(num_tokens, vocab_size)` with an empty prefix, so that repetition penalties have no effect.
            prior_state (`torch.Tensor` of shape `(num_samples, length, embedding_size)`, *optional*):
                Noise to start from, as a state. Project one-hot noise of shape `(num_samples, length, vocab_size)` by
                `noise @ model.state_embedding`. Drawn by default. Sets `num_samples` and `length`. With a `guidance_model` of
                another embedding, its state follows along the last dimension.
            noise_source (`Callable[[list[int]], torch.Tensor]`, *optional*):
                Replaces the generator for noise (not for drawn tokens). Called with the indices of samples, it returns new
                states for these, as `prior_state`: at the start unless a `prior_state` is passed, at every step that adds
                noise, and at every later round with `fresh_noise`.
            guidance_model ([`~transformers.PreTrainedModel`], *optional*):
                A weaker version of the model to move away from (autoguidance), with strength `guidance_scale`: an earlier
                checkpoint, a smaller model or another average of the weights, with the same vocabulary.
            negative_prompt_ids (`torch.LongTensor` of the shape of `input_ids`, or of one row, *optional*):
                Tokens in the place of the known ones, to move away from (classifier-free guidance), with strength
                `guidance_scale`: another prompt, or padding tokens for none, which models trained with `prompt_dropout` know. Takes
                two forward passes at each step.
            reward (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
                A differentiable function to maximize, with weight `reward_scale`, from soft tokens of shape
                `(batch_size, length, vocab_size)` to rewards of shape `(batch_size,)`, such as a [`ClassifierReward`]. At
                every step it is applied to the text predicted from the state, which takes another forward pass and a backward
                pass. With rounds or blocks, a batch has only the samples that are not finished.
            streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
                Receives the finished text by `put`, and before that a draft of every step if it has a `put_draft`, as
                [`~transformers.TextDiffusionStreamer`] does. With rounds or blocks, it receives the known prefix by `put` and
                the rest of every round as a draft. Requires a single sample.
            callback (`Callable`, *optional*):
                Called as `callback(step, num_steps, tokens)` after every step, from 1 to `num_steps`, with the tokens of the
                current batch, of shape `(batch_size, length)`. With rounds or blocks, called after each of these instead,
                even if there was nothing left to generate.
            compile_config ([`~transformers.CompileConfig`], *optional*):
                Compiles a step as one graph, with these arguments of `torch.compile`. The first calls take long; later ones
                with the same batch size and length are faster. `torch.compile(model)` compiles `forward`, which `generate`
                does not call: pass `compile_config=CompileConfig()` instead.
            kwargs:
                Further parameters of [`FLMGenerationConfig`], such as `length`, `batch_size` or `temperature`. Also
                `num_inference_steps` for `num_steps`, `num_return_sequences` for the number of samples of each prompt, and
                `max_new_tokens` for the `length` without the prompt.

        Returns:
            `torch.LongTensor` of shape `(num_samples, length)`, or [`FLMGenerationOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            `ValueError`: if a parameter is unknown or has an invalid value, or if the model's output is not finite, as after a
            training that diverged.

        Example:

        ```python
        >>> model = AutoModel.from_pretrained("path/to/model", trust_remote_code=True)
        >>> tokens = model.generate(num_samples=8, num_steps=32, generator=torch.Generator().manual_seed(0))
        >>> texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        >>> prompt = tokenizer(tokenizer.bos_token + "The cat", add_special_tokens=False, return_tensors="pt")
        >>> tokens = model.generate(**prompt, num_steps=32)
        ```
        """
        kwargs.pop("token_type_ids", None)  # made by BERT tokenizers
        prompts = Prompts(input_ids, attention_mask, prompt_mask, negative_prompt_ids)
        check_types(generator, logits_processor, prior_state, noise_source, streamer, callback, compile_config)
        sizes = prompts.sizes()
        if prior_state is not None and prior_state.dim() == 3:
            sizes |= dict(zip(("num_samples", "length"), prior_state.shape))
        config = resolve_generation_config(
            self.generation_config,
            generation_config,
            {**kwargs, "num_samples": num_samples, "num_steps": num_steps},
            sizes,
            self.config.max_position_embeddings,
            num_prompts=1 if prompts.num_rows is None else prompts.num_rows,
            prompt_length=prompts.common_length,
        )
        if streamer is not None and config.num_samples != 1:
            raise ValueError(f"`streamer` needs a single sample: pass `num_samples=1`, got {config.num_samples}.")
        model = add_guidance(self, guidance_model, config, negative_prompt_ids is not None)
        if config.num_fixed_point_iterations > 1 and not model.takes_estimate:
            raise ValueError("`num_fixed_point_iterations` needs a model with `self_conditioning`: leave it out.")
        embedding = model.state_embedding.float()
        known = prompts.known_tokens(config, self.config.vocab_size, embedding.device)
        if prior_state is not None:
            check_state("prior_state", prior_state, (config.num_samples, config.length, embedding.shape[1]))
        sampler, rule = config.sampler_config.build(), build_commit_rule(config)
        reward = check_reward(reward, sampler, config)
        is_softmax = model is self and len(self.state_sizes) == 1
        reads_more = sampler.draws_tokens or rule.reads_probabilities or reward is not None
        warn_about_no_effect(config, logits_processor, only_argmax=is_softmax and not reads_more)
        if compile_config is None:
            warn_about_compiled_forward(self)
        draws_more = sampler.draws_noise or sampler.draws_tokens or rule.draws_noise
        needs_factor = reward is not None or (noise_source is None and (prior_state is None or draws_more))
        call = _Call(
            config=config,
            sampler=sampler,
            rule=rule,
            stopping=build_stopping_rule(config, rule, compile_config),
            model=model,
            embedding=embedding,
            factor=get_noise_factor(self, embedding, model.state_sizes) if needs_factor else None,
            logits_processor=build_logits_processor(config, logits_processor),
            reward=reward,
            output_drafts=config.output_drafts,
            stream=None if streamer is None else _TextStream(streamer),
            callback=callback,
            compile_config=compile_config,
            finite=[],
        )
        generators = generator if isinstance(generator, list) else [generator] * config.num_samples
        if len(generators) != config.num_samples:
            raise ValueError(
                f"`generator` has {len(generators)} generators for {config.num_samples} samples: pass one for each."
            )

        batches = []
        bar = logging.tqdm(
            total=config.num_samples, desc="Generating", unit="text", disable=config.num_samples <= config.batch_size
        )
        with bar:
            for start in range(0, config.num_samples, config.batch_size):
                end = min(start + config.batch_size, config.num_samples)
                samples = list(range(start, end))
                random = Randomness(
                    samples, generators[start:end], config.length, embedding, call.factor, noise_source
                )
                # States are in float32, whatever precision the model runs in
                with torch.autocast(embedding.device.type, enabled=False):
                    state, random = random.start(prior_state, draws_more)
                batches.append(self._run_rounds(call, state, known[start:end], random))
                bar.update(end - start)

        if not torch.compiler.is_compiling() and not torch.stack(call.finite).all():
            raise ValueError(
                "The model's output is not finite. Its weights may have diverged in training, or be too large for "
                f"{self.dtype}."
            )
        output = FLMGenerationOutput(
            **{name: torch.cat([batch[name] for batch in batches]) for name in batches[0].keys()}
        )
        generated = known.is_open
        if config.pad_after_eos:
            generated = generated & ~is_after_eos(output.sequences, generated, config)
            output.sequences = pad_after_eos(output.sequences, known, config)
        passes = output.num_forward_passes.to(generated.device)
        output.tokens_per_forward = generated.sum(dim=1) / passes.clamp(min=1) * (passes > 0)
        if call.stream is not None:
            call.stream.end(output.sequences)
        return output if config.return_dict_in_generate else output.sequences

    def _run_rounds(
        self, call: _Call, state: torch.Tensor, known: KnownTokens, random: Randomness
    ) -> FLMGenerationOutput:
        """
        Runs the loop of rounds for a batch, steps a to c of the docstring of `generate`.

        Args:
            call (`_Call`): The call of `generate`.
            state (`torch.Tensor` of shape `(batch_size, length, embedding_size)`): States of noise.
            known (`KnownTokens`): The known tokens of the batch.
            random (`Randomness`): The random numbers of the batch.

        Returns:
            [`FLMGenerationOutput`]: of the batch, before `pad_after_eos`.
        """
        config, rule, prompt = call.config, call.rule, known
        # Of a step
        cost = config.num_fixed_point_iterations * (1 if known.negative is None else 2) + (call.reward is not None)
        if rule.num_rounds is None:
            samples = self._run_steps(call, state, known, random)
            return FLMGenerationOutput(samples.tokens, samples.drafts, cost * samples.num_steps)

        # Streamers, callbacks and drafts get whole rounds, which include finished sequences
        inner = replace(call, output_drafts=False, stream=None, callback=None)
        state, tokens, drafts = state.clone(), known.tokens.clone(), []
        commit_rounds, num_passes = torch.zeros_like(tokens), torch.zeros_like(tokens[:, 0])
        for round in progress(rule.num_rounds, "round"):
            is_open = known.is_open
            rows = rule.due(round, is_open).any(dim=1).nonzero().flatten()
            if len(rows) > 0:
                # a. Generate the unknown tokens
                count, row_random = len(rows), random[rows.tolist()]
                if round > 0 and rule.draws_noise:
                    state[rows] = row_random.noise()
                if call.compile_config is not None:  # a step is compiled for one batch size
                    rows = torch.cat([rows, rows[:1].expand(len(state) - count)])
                    row_random = row_random.pad(len(rows))
                samples = self._run_steps(inner, state[rows], known[rows], row_random)
                rows = rows[:count]
                tokens[rows] = samples.tokens[:count]
                num_passes[rows] += cost * config.num_steps
                # b. Commit some of them
                committed = torch.zeros_like(is_open)
                committed[rows] = rule.commit(round, samples.probabilities[:count], is_open[rows])
                if config.pad_after_eos:  # nothing is generated after a committed EOS token
                    may_end = prompt.is_open & (committed | ~is_open)
                    committed |= is_open & is_after_eos(tokens, may_end, config)
                commit_rounds[committed] = round + 1
                known = known.commit(tokens, committed)
                # c. The others start from noise again
                if call.stream is not None:
                    padded = pad_after_eos(tokens, prompt, config) if config.pad_after_eos else tokens
                    call.stream.show(padded, num_final=int((~known.is_open).long().cumprod(dim=1).sum()))
            if call.output_drafts:
                drafts.append(tokens.clone())
            if call.callback is not None:
                call.callback(round + 1, rule.num_rounds, tokens.clone())
        drafts = torch.stack(drafts, dim=1) if call.output_drafts else None
        return FLMGenerationOutput(known.tokens, drafts, num_passes, commit_rounds=commit_rounds)

    def _run_steps(self, call: _Call, state: torch.Tensor, known: KnownTokens, random: Randomness) -> _Samples:
        """
        Runs the loop of steps for a batch, steps 1 to 6 of the docstring of `generate`.

        Args:
            call (`_Call`): The call of `generate`.
            state (`torch.Tensor` of shape `(batch_size, length, embedding_size)`): States of noise.
            known (`KnownTokens`): The known tokens of the batch.
            random (`Randomness`): The random numbers of the batch.
        """
        config, sampler, compile_config, embedding = call.config, call.sampler, call.compile_config, call.embedding
        shows_drafts = call.stream is not None and call.stream.takes_drafts
        wants_drafts = call.output_drafts or shows_drafts or call.callback is not None
        advance = self._step if compile_config is None else self._get_compiled_step(compile_config)
        if config.timestep_grid is None:
            tau = torch.linspace(0, 1, config.num_steps + 1, device=state.device)
        else:
            tau = torch.tensor(config.timestep_grid, dtype=torch.float32, device=state.device)
        t = self.time_map.tau_to_t(tau)
        target_tau = sampler.target_tau(tau[:-1], tau[1:], self.time_map)

        # 1. Known tokens have the time 1 and a clean state
        state = known.start(state, embedding)
        estimate = torch.zeros_like(state) if call.model.takes_estimate else None
        texts = None if call.stopping is None else _SettlingTexts(call.stopping, known.tokens)
        num_steps = torch.full_like(known.tokens[:, 0], config.num_steps)
        drafts = []
        for step in progress(config.num_steps, "step"):
            is_last = step == config.num_steps - 1
            grid = (tau[step], target_tau[step], t[step], t[step + 1])
            times = _Times(*(times_with_known(time.repeat(len(state)), known.mask) for time in grid))
            # 2. Move along the gradient of the reward
            if call.reward is not None:
                state = self._steer_by_reward(call, state, estimate, known, times, is_first=step == 0)
            # 3. to 6.
            uniforms = random.uniforms() if sampler.draws_tokens else None
            noise = random.noise() if sampler.draws_noise and not is_last else None
            if compile_config is not None:
                torch.compiler.cudagraph_mark_step_begin()
            output = advance(
                call.model,
                sampler,
                state,
                estimate,
                config.num_fixed_point_iterations,
                times,
                embedding,
                known.attention_mask,
                call.logits_processor,
                uniforms,
                noise,
                is_last=is_last,
                with_tokens=wants_drafts or texts is not None,
                with_probabilities=call.rule.reads_probabilities,
                with_entropies=texts is not None,
            )
            if compile_config is not None:  # CUDA graphs reuse their output memory
                output = _StepOutput(*(None if x is None else x.clone() for x in output))
            state, estimate, tokens, probabilities, entropies = output
            tokens = None if tokens is None else known.complete(tokens)
            if is_last or texts is not None:
                values = probabilities if is_last else entropies
                call.finite.append((torch.isfinite(values) | ~known.is_open).all())
            if texts is not None:
                rest = texts.update(tokens, entropies, known.is_open)
                tokens, num_steps = texts.tokens.clone(), texts.num_steps
            if shows_drafts and not is_last:
                call.stream.show(tokens)
            if call.output_drafts:
                drafts.append(tokens)
            if call.callback is not None:
                call.callback(step + 1, config.num_steps, tokens)
            if texts is not None and len(rest) < len(known.tokens):
                if len(rest) == 0:
                    break
                state, known, random = state[rest], known[rest], random[rest.tolist()]
                estimate = None if estimate is None else estimate[rest]
        if call.output_drafts:  # as many as steps
            drafts += [tokens] * (config.num_steps - len(drafts))
        return _Samples(tokens, probabilities, torch.stack(drafts, dim=1) if drafts else None, num_steps)

    @staticmethod
    def _step(
        model: PreTrainedModel | Autoguidance,
        sampler: Sampler,
        state: torch.Tensor,
        estimate: torch.Tensor | None,
        num_iterations: int,
        times: _Times,
        embedding: torch.Tensor,
        attention_mask: torch.Tensor | None,
        logits_processor: LogitsProcessorList,
        uniforms: torch.Tensor | None,
        noise: torch.Tensor | None,
        is_last: bool,
        with_tokens: bool,
        with_probabilities: bool,
        with_entropies: bool,
    ) -> _StepOutput:
        """
        Runs steps 3 to 6 of the docstring of `generate`, as one graph if compiled.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`Autoguidance`]): The model, guided or not.
            sampler ([`Sampler`]): The sampler.
            state (`torch.Tensor` of shape `(batch_size, length, embedding_size)`): The state.
            estimate (`torch.Tensor` of the shape of `state`, *optional*): The estimate of the step before, for self-conditioning.
            num_iterations (`int`): Number of forward passes.
            times (`_Times`): The times of the step.
            embedding (`torch.Tensor` of shape `(vocab_size, embedding_size)`): The embedding of the states.
            attention_mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): The positions of each sequence.
            logits_processor ([`~transformers.LogitsProcessorList`]): The processors of the logits.
            uniforms (`torch.Tensor` of shape `(batch_size, length)`, *optional*): To draw tokens, for samplers that do.
            noise (`torch.Tensor` of the shape of `state`, *optional*): New noise, for samplers that add some.
            is_last (`bool`): Whether this is the last step, which returns tokens and probabilities, and no state.
            with_tokens (`bool`): Whether to return tokens before the last step as well.
            with_probabilities (`bool`):
                Whether the last step returns the probabilities of the tokens. Otherwise it returns the probability of token
                0, for a finiteness check.
            with_entropies (`bool`): Whether the other steps return the entropies of the predictions.
        """
        # 3. The posterior of the clean tokens
        inputs = (state, times.tau_s, times.target_tau, attention_mask, logits_processor)
        posterior = model.posterior(*inputs, estimate)
        for _ in range(num_iterations - 1):
            posterior = model.posterior(*inputs, posterior.mean(embedding))
        # 6. The tokens
        if is_last:
            read_tokens = sampler.read_tokens(uniforms)
            # Non-finite states stay non-finite, and their softmax has no finite entry: one probability is enough to detect them
            read_probabilities = probability_of(read_tokens) if with_probabilities else first_probability
            return _StepOutput(None, None, *posterior.read(read_tokens, read_probabilities))
        # 4. An estimate of the text
        readers = [entropy] if with_entropies else []
        if estimate is not None and sampler.draws_tokens:
            readers.append(mean_embedding(embedding))
        text, tokens, *readings = sampler.estimate(posterior, embedding, uniforms, with_tokens, *readers)
        entropies = readings.pop(0) if with_entropies else None
        if estimate is not None:
            estimate = readings[0] if readings else text
        # 5. The state at the next time
        return _StepOutput(sampler.move(state, text, times.s, times.t, noise), estimate, tokens, None, entropies)

    def _steer_by_reward(
        self,
        call: _Call,
        state: torch.Tensor,
        estimate: torch.Tensor | None,
        known: KnownTokens,
        times: _Times,
        is_first: bool,
    ) -> torch.Tensor:
        """
        Moves the state along the gradient of the reward of the predicted text, see [`~guidance_flm.steer_by_reward`].

        Args:
            call (`_Call`): The call of `generate`.
            state (`torch.Tensor` of shape `(batch_size, length, embedding_size)`): The state.
            estimate (`torch.Tensor` of the shape of `state`, *optional*): The estimate of the step before, for self-conditioning.
            known (`KnownTokens`): The known tokens of the batch.
            times (`_Times`): The times of the step.
            is_first (`bool`): Whether this is the first step, which predicts the text by the whole jump.
        """
        size = sum(self.state_sizes)  # the rest is the state of a guidance model
        tau_end = torch.ones_like(times.tau_s) if is_first else times.tau_s
        inputs = (times.tau_s, tau_end, known.attention_mask, call.logits_processor)
        estimate = estimate[..., :size] if self.takes_estimate else None

        def look_ahead(state: torch.Tensor) -> torch.Tensor:
            posterior = self.posterior(state[..., :size], *inputs, estimate)
            return known.complete_soft(posterior.dense())

        scale = call.config.reward_scale * reward_coefficient(times.s, times.t)
        return steer_by_reward(call.reward, look_ahead, state, expand_times(scale, state), call.factor)

    def _get_compiled_step(self, compile_config: CompileConfig) -> Callable:
        if self._compiled_step is None or self._compiled_step[0] != compile_config:
            raise_recompile_limit()  # each batch size has two graphs
            compiled = torch.compile(self._step, **compile_config.to_dict())
            self._compiled_step = (copy.copy(compile_config), compiled)
        return self._compiled_step[1]

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        trust_remote_code=None,
        **kwargs,
    ):
        """Called by `from_pretrained` to set `model.generation_config`."""
        if generation_config is not None:
            self.generation_config = as_flm_generation_config(generation_config)
        if generation_config is not None or pretrained_model_name_or_path is None:
            return
        options = {**kwargs, "_from_auto": from_auto_class, "_from_pipeline": from_pipeline}
        loaded = load_generation_config(self.generation_config_class, pretrained_model_name_or_path, options)
        if loaded is not None:
            self.generation_config = loaded


__all__ = ["FLMGenerationMixin"]
