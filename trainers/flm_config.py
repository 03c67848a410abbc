# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`FLMTrainer`]."""

import re
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from .batches import PROMPT_KINDS


@dataclass
class FLMTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`FLMTrainer`]: those of [`~transformers.TrainingArguments`], and the ones below.

    The defaults of `learning_rate` and `lr_scheduler_type` are the paper's; it also warms up for 2500 steps
    (`warmup_steps=2500`) and trains in bfloat16 (`bf16=True`) with a global batch of 512 texts.
    `logging_nan_inf_filter` is off: a loss that is not finite shows in the logs, and no step waits for the device to
    look for it. `torch_compile=True` compiles the blocks and the losses of all networks, see
    [`~FLMPreTrainedModel.compile_regions`].

    Parameters:
        ema_decay (`float`, *optional*, defaults to 0.9999):
            Decay of the exponential moving average of the weights, which warms up as
            `min(ema_decay, (1 + n) / (10 + n))` after `n` steps. Evaluation, samples, saved models and pushed models use
            the averaged weights; checkpoints hold both. `None` turns it off.
        prompt_fraction (`float`, *optional*, defaults to 0.0):
            The share of the examples of which some tokens are known, and the rest is to be learned, see `prompt_kinds`. So a
            model learns to continue prompts and to fill in, best one
            that is told the time of each token (`FLMConfig(per_token_timesteps=True)`).
        prompt_kinds (`list[str]`, *optional*, defaults to `["prefix", "infill", "random"]`):
            Which tokens are known in the examples of `prompt_fraction`, equally often each: how a text begins (`"prefix"`),
            what is around a gap (`"infill"`), some number of tokens anywhere (`"random"`), or each token by itself with a
            probability that is drawn for the text (`"independent"`, as for FMLM+).
        prompts_from_labels (`bool`, *optional*, defaults to `False`):
            Whether tokens whose label is -100 and that are not padding are known, in training and in evaluation: the
            question in a text that is a question and its answer. Otherwise they are noised as the others are.
        eval_likelihood_times (`int`, *optional*, defaults to 0):
            Log the bound on the negative log-likelihood of the evaluation texts, in nats per token, as `eval_nll`, and
            `eval_perplexity`, its exponential: how many times each text is noised for it, such as 32, with a forward pass
            each. 0 does not. `metric_for_best_model` takes either. See [`~FLMLikelihoodMixin.log_likelihood_bound`].
        sample_steps (`int`, *optional*, defaults to 0):
            Write samples to `samples.jsonl` in `output_dir` every so many optimizer steps. 0 writes none.
        sample_num_samples (`int`, *optional*, defaults to 4):
            The number of texts to write.
        sample_num_steps (`int`, *optional*, defaults to 32):
            The number of steps from noise to text for these samples.
        eval_gen_ppl_steps (`int`, *optional*, defaults to 0):
            Log the generative perplexity and the entropy of samples every so many optimizer steps, as `eval_gen_ppl_N` and
            `eval_entropy_N` for N steps from noise to text. 0 does not. Needs `pip install modeling-flm[evaluate]`.

            The best checkpoint can be chosen by it: `metric_for_best_model="eval_gen_ppl_1"` with
            `load_best_model_at_end=True` or `save_strategy="best"`, where lower is better by default. Perplexity alone
            favors dull texts; the entropy beside it tells.
        eval_gen_ppl_num_steps (`list[int]`, *optional*, defaults to `[1, 2, 4, 32]`):
            The numbers of steps from noise to text to do so for.
        eval_gen_ppl_num_samples (`int`, *optional*, defaults to 256):
            The number of texts.
        eval_gen_ppl_model (`str`, *optional*, defaults to `"gpt2-large"`):
            Name or folder of the causal language model that scores them.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "The learning rate schedule; see `transformers.SchedulerType`."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs; each step waits for it."}
    )
    ema_decay: float | None = field(
        default=0.9999,
        metadata={
            "help": "Decay of the moving average of the weights, warmed up as min(ema_decay, (1 + n) / (10 + n)). "
            "Evaluation and saved models use the averaged weights. `None` turns it off."
        },
    )
    prompt_fraction: float = field(
        default=0.0,
        metadata={"help": "The share of the examples of which some tokens are known, to learn to write the rest."},
    )
    prompt_kinds: list[str] = field(
        default_factory=lambda: ["prefix", "infill", "random"],
        metadata={
            "help": "Which tokens are known in these examples, equally often each.",
            "choices": list(PROMPT_KINDS),
        },
    )
    prompts_from_labels: bool = field(
        default=False, metadata={"help": "Tokens whose label is -100, and that are not padding, are known."}
    )
    eval_likelihood_times: int = field(
        default=0,
        metadata={
            "help": "Log the bound on the likelihood of evaluation texts, with so many noised versions of each; 0 does not."
        },
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Write samples to samples.jsonl every so many steps; 0 writes none."}
    )
    sample_num_samples: int = field(default=4, metadata={"help": "The number of texts to write."})
    sample_num_steps: int = field(default=32, metadata={"help": "The number of steps from noise to text for samples."})
    eval_gen_ppl_steps: int = field(
        default=0, metadata={"help": "Log the generative perplexity of samples every so many steps; 0 does not."}
    )
    eval_gen_ppl_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 32], metadata={"help": "The numbers of sampling steps to do so for."}
    )
    eval_gen_ppl_num_samples: int = field(default=256, metadata={"help": "The number of texts for it."})
    eval_gen_ppl_model: str = field(default="gpt2-large", metadata={"help": "The language model that scores them."})

    def __getstate__(self):
        # `Trainer` pickles its arguments beside the model, where a token has no business.
        return {**self.__dict__, "hub_token": None}

    @property
    def selects_by_likelihood(self) -> bool:
        """Whether `metric_for_best_model` is the likelihood of the evaluation texts."""
        return (self.metric_for_best_model or "").removeprefix("eval_") in ("nll", "perplexity")

    @property
    def selects_by_gen_ppl(self) -> bool:
        """Whether `metric_for_best_model` is the generative perplexity, or the entropy, of samples."""
        return re.fullmatch(r"(eval_)?(gen_ppl.*|entropy_\d+)", self.metric_for_best_model or "") is not None

    def _check_selection_by_gen_ppl(self):
        """Raises a `ValueError` where an evaluation would not find the figure that `metric_for_best_model` names."""
        metric = self.metric_for_best_model
        needs = f"`metric_for_best_model={metric!r}` needs"
        names = [f"eval_{name}_{n}" for name in ("gen_ppl", "entropy") for n in self.eval_gen_ppl_num_steps]
        if self.eval_gen_ppl_steps < 1:
            raise ValueError(
                f"{needs} the figures of samples: pass `eval_gen_ppl_steps`, for example that of `eval_steps`."
            )
        if f"eval_{metric.removeprefix('eval_')}" not in names:
            raise ValueError(
                f"{needs} its number of sampling steps to be one of `eval_gen_ppl_num_steps`: pass that too, or one of "
                f"{', '.join(names)}."
            )
        if self.eval_strategy != "steps":
            raise ValueError(
                f"{needs} an evaluation at the steps at which samples are scored: pass `eval_strategy='steps'` and "
                f"`eval_steps={self.eval_gen_ppl_steps}`, got `eval_strategy={str(self.eval_strategy)!r}`."
            )
        eval_steps = self.eval_steps or self.logging_steps  # as in `TrainingArguments`
        if eval_steps % self.eval_gen_ppl_steps != 0:
            raise ValueError(
                f"{needs} scored samples at every evaluation: pass `eval_steps` as a multiple of "
                f"`eval_gen_ppl_steps={self.eval_gen_ppl_steps}`, got {eval_steps}."
            )

    def __post_init__(self):
        for definition in fields(self):
            value = getattr(self, definition.name)
            if type(definition.default) in (int, float) and isinstance(value, str):
                raise ValueError(f"`{definition.name}` must be a number, got the text {value!r}.")
        if self.selects_by_gen_ppl:
            self._check_selection_by_gen_ppl()
            if self.greater_is_better is None and "gen_ppl" in self.metric_for_best_model:
                self.greater_is_better = False  # `TrainingArguments` would take it for a score
        if self.greater_is_better is None and self.selects_by_likelihood:
            self.greater_is_better = False
        super().__post_init__()
        if not self.learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0, got {self.learning_rate}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.eval_likelihood_times != 0 and self.eval_likelihood_times < 2:
            raise ValueError(f"`eval_likelihood_times` must be at least 2, or 0, got {self.eval_likelihood_times}.")
        if self.selects_by_likelihood and self.eval_likelihood_times == 0:
            raise ValueError(
                f"`metric_for_best_model={self.metric_for_best_model!r}` needs the likelihood of the evaluation texts: pass "
                "`eval_likelihood_times`, such as 32."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, or `None`, got {self.ema_decay}.")
        if not 0 <= self.prompt_fraction <= 1:
            raise ValueError(f"`prompt_fraction` must be in [0, 1], got {self.prompt_fraction}.")
        if not self.prompt_kinds or not set(self.prompt_kinds) <= set(PROMPT_KINDS):
            raise ValueError(
                f"`prompt_kinds` must be a list of {', '.join(map(repr, PROMPT_KINDS))}, got {self.prompt_kinds!r}."
            )
        for name in ("sample_steps", "eval_gen_ppl_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not self.eval_gen_ppl_num_steps or min(self.eval_gen_ppl_num_steps) < 1:
            raise ValueError(
                f"`eval_gen_ppl_num_steps` must be numbers of at least 1, got {self.eval_gen_ppl_num_steps}."
            )
        for name in ("sample_num_samples", "sample_num_steps", "eval_gen_ppl_num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
