# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainers: samples during training and their generative perplexity."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .averaging import EMACallback
from .distributed import is_sharded, through_forward
from .evaluation import generate_samples, load_gen_ppl
from .flm_config import FLMTrainingArguments


def _from_average(model: PreTrainedModel, ema: EMACallback | None, function: Callable[[], Any]) -> Any:
    """Calls `function` while `model` has the averaged weights, if there are any."""
    with nullcontext() if ema is None else ema.applied(model):
        return through_forward(model, model, function)


class SampleCallback(TrainerCallback):
    """
    Writes samples to `samples.jsonl` in the output directory every `args.sample_steps` optimizer steps, one JSON object
    with `step`, `num_steps` and `text` per line. Every time the samples start from the same noise.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes samples.
        ema (`EMACallback`, *optional*): Average to sample from, instead of the training weights.
    """

    def __init__(self, tokenizer, ema: EMACallback | None = None):
        self.tokenizer = tokenizer
        self.ema = ema

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.sample_steps != 0:
            return
        if not state.is_world_process_zero and not is_sharded(model):  # all processes take part in a sharded model
            return
        tokens = _from_average(model, self.ema, lambda: self._generate(args, model))
        if not state.is_world_process_zero:
            return
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        path = Path(args.output_dir) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for text in texts:
                row = {"step": state.global_step, "num_steps": args.sample_num_steps, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @staticmethod
    def _generate(args, model: PreTrainedModel) -> torch.LongTensor:
        return model.generate(
            num_samples=args.sample_num_samples,
            num_steps=args.sample_num_steps,
            generator=torch.Generator().manual_seed(args.seed),
        )


class GenPPLCallback(TrainerCallback):
    """
    Logs the generative perplexity and entropy of samples every `args.eval_gen_ppl_steps` optimizer steps, as `eval_gen_ppl_N`
    and `eval_entropy_N` for each number N of sampling steps. All processes generate, the first scores.

    An evaluation at the same step has the figures among its metrics: `args.metric_for_best_model` may name one of them, and
    later callbacks, such as [`~transformers.EarlyStoppingCallback`], see them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes samples.
        log (`Callable[[dict[str, float]], None]`): The trainer's `log`.
        ema (`EMACallback`, *optional*): Average to sample from, instead of the training weights.
    """

    def __init__(self, tokenizer, log: Callable[[dict[str, float]], None], ema: EMACallback | None = None):
        self.tokenizer = tokenizer
        self.log = log
        self.ema = ema
        self.metric = load_gen_ppl()
        self.figures: dict[str, float] = {}
        self.step: int | None = None  # step of these figures

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = None
        if state.is_world_process_zero:  # a missing scorer should fail now
            self._score(args, ["a text"], None)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # `Trainer` also evaluates after the last step, and needs the figure that it selects by.
        is_missed = control.should_evaluate and args.selects_by_gen_ppl
        if state.global_step % args.eval_gen_ppl_steps != 0 and not is_missed:
            return
        figures = _from_average(model, self.ema, lambda: self._evaluate(args, state, model))
        (self.figures,) = broadcast_object_list([figures])  # all processes select the best checkpoint
        self.step = state.global_step
        should_log = control.should_log
        # All samples may be empty, and have no perplexity.
        self.log({name: value for name, value in self.figures.items() if math.isfinite(value)})
        control.should_log = should_log  # logging resets it

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == self.step:
            metrics.update(self.figures)  # in place: `Trainer` selects the best checkpoint by the same dictionary

    def on_train_end(self, args, state, control, **kwargs):
        self.step = None  # the best checkpoint may be loaded now

    def _evaluate(self, args, state, model: PreTrainedModel) -> dict[str, float]:
        # All processes make equally many samples, as FSDP requires; surplus samples are dropped.
        share = math.ceil(args.eval_gen_ppl_num_samples / args.world_size)
        indices = list(range(args.process_index * share, (args.process_index + 1) * share))
        logs = {}
        for num_steps in args.eval_gen_ppl_num_steps:
            tokens = generate_samples(model, indices, args.seed, num_steps=num_steps)
            rows = sorted(gather_object(list(zip(indices, tokens.tolist()))))
            if state.is_world_process_zero:
                tokens = [row for _, row in rows[: args.eval_gen_ppl_num_samples]]
                result = self._score(args, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), tokens)
                figures = {name: math.nan if result[name] is None else result[name] for name in ("gen_ppl", "entropy")}
                logs |= {f"eval_{name}_{num_steps}": value for name, value in figures.items()}
        return logs

    def _score(self, args, texts: list[str], token_ids: list[list[int]] | None) -> dict[str, Any]:
        return self.metric.compute(
            predictions=texts, token_ids=token_ids, model_id=args.eval_gen_ppl_model, device=str(args.device)
        )


def sampling_callbacks(
    args: FLMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    log: Callable[[dict[str, float]], None],
    ema: EMACallback | None = None,
) -> list[TrainerCallback]:
    """Returns the callbacks that training arguments ask for."""
    callbacks: list[TrainerCallback] = []
    if args.sample_steps > 0:
        callbacks.append(SampleCallback(tokenizer, ema))
    if args.eval_gen_ppl_steps > 0:
        callbacks.append(GenPPLCallback(tokenizer, log, ema))
    return callbacks
