# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`FLMTrainer`]."""

import math
import re
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from modeling_flm.utils_flm import as_python

from .batches import PROMPT_KINDS


_LEAST = {
    "confident_rounds": 1,
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(
        ("eval_accumulation_steps", "sample_num_samples", "sample_num_steps", "eval_gen_ppl_num_samples"), 1
    ),
    **dict.fromkeys(
        ("seed", "data_seed", "dataloader_num_workers", "warmup_steps", "learning_rate", "weight_decay"), 0
    ),
    **dict.fromkeys(("max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "sample_steps"), 0),
    **dict.fromkeys(("eval_gen_ppl_steps", "logging_steps", "eval_steps", "save_steps", "eval_delay"), 0),
}
_BELOW = {"adam_beta1": 1, "adam_beta2": 1, "seed": 2**32, "data_seed": 2**32}


def check_numbers(arguments: object, least: dict[str, float], below: dict[str, float] | None = None):
    """
    Checks the ranges of numbers.

    Args:
        arguments (`object`): Has the numbers as attributes. `None` is none.
        least (`dict[str, float]`): Smallest value of each attribute.
        below (`dict[str, float]`, *optional*): What an attribute must be below.

    Raises:
        `ValueError`: if a number is out of its range.
    """
    for name, minimum in least.items():
        value, end = getattr(arguments, name), (below or {}).get(name, math.inf)
        if value is not None and not minimum <= value < end and value != math.inf:
            limit = "" if end == math.inf else f" and below {end}"
            raise ValueError(f"`{name}` must be at least {minimum}{limit}, got {value}.")


@dataclass
class FLMTrainingArguments(TrainingArguments):
    r"""
    Arguments of [`FLMTrainer`], in addition to [`~transformers.TrainingArguments`].

    The defaults of `learning_rate` and `lr_scheduler_type` are the paper's, which also uses 2500 warm-up steps
    (`warmup_steps=2500`), bfloat16 (`bf16=True`) and a global batch of 512 examples. `logging_nan_inf_filter` is off: the logs
    show a loss that is not finite, and no step waits for the device to check it. `torch_compile=True` compiles the blocks and
    losses of all networks, see [`~FLMPreTrainedModel.compile_regions`].

    Parameters:
        ema_decay (`float`, *optional*, defaults to 0.9999):
            Decay of the exponential moving average of the weights, warmed up as `min(ema_decay, (1 + n) / (10 + n))` after `n`
            steps. Evaluation, samples, and saved and published models use the averaged weights; checkpoints hold both. `None`
            disables it.
        prompt_fraction (`float`, *optional*, defaults to 0.0):
            Fraction of the examples with known tokens, see `prompt_kinds`. Only unknown tokens are trained on. Use this to train
            prompting and infilling, ideally with `FLMConfig(per_token_timesteps=True)`.
        prompt_kinds (`list[str]`, *optional*, defaults to `["prefix", "infill", "random"]`):
            Patterns of known tokens in these examples, equally likely: a prefix (`"prefix"`), the context of a gap (`"infill"`), a
            random subset (`"random"`), each token independently with a probability drawn for the example (`"independent"`, as for
            FMLM+), or the positions where the model is most confident at its present weights (`"confident"`).
        confident_rounds (`int`, *optional*, defaults to 4):
            For the pattern `"confident"`: in how many rounds refinement would commit all tokens. An example is trained after some of
            these rounds, from none to all but one, each of which takes a forward pass.
        prompts_from_labels (`bool`, *optional*, defaults to `False`):
            Whether tokens with label -100, except padding, are known in training and evaluation, such as the question before
            an answer. Otherwise they are noised like all others.
        prompt_dropout (`float`, *optional*, defaults to 0.0):
            Fraction of the examples whose known tokens are replaced by padding, in training and evaluation, for classifier-free
            guidance: `generate(..., negative_prompt_ids=...)` with padding moves away from texts without a prompt. Needs a
            `pad_token_id`.
        eval_likelihood_times (`int`, *optional*, defaults to 0):
            Number of noise levels, such as 32, at which each evaluation example is noised to bound its negative log-likelihood;
            each costs a forward pass. The bound is logged in nats per token as `eval_nll`, and its exponential as
            `eval_perplexity`. `metric_for_best_model` may name either. 0 disables it. See
            [`~FLMLikelihoodMixin.log_likelihood_bound`].
        sample_steps (`int`, *optional*, defaults to 0):
            Number of optimizer steps between samples, which are written to `samples.jsonl` in `output_dir`. 0 disables it.
        sample_num_samples (`int`, *optional*, defaults to 4):
            Number of samples.
        sample_num_steps (`int`, *optional*, defaults to 32):
            Number of sampling steps of these samples.
        eval_gen_ppl_steps (`int`, *optional*, defaults to 0):
            Number of optimizer steps between measurements of the generative perplexity and entropy of samples, which are logged
            as `eval_gen_ppl_N` and `eval_entropy_N` for N sampling steps. 0 disables it. Needs
            `pip install modeling-flm[evaluate]`.

            To choose the best checkpoint by it, pass `metric_for_best_model="eval_gen_ppl_1"` with
            `load_best_model_at_end=True` or `save_strategy="best"`; lower is better by default. Low perplexity can be reached
            by repetitive text: compare the entropy too.
        eval_gen_ppl_num_steps (`list[int]`, *optional*, defaults to `[1, 2, 4, 32]`):
            Numbers of sampling steps to measure.
        eval_gen_ppl_num_samples (`int`, *optional*, defaults to 256):
            Number of samples to measure.
        eval_gen_ppl_model (`str`, *optional*, defaults to `"gpt2-large"`):
            Name or folder of the causal language model that scores the samples.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "Learning rate schedule; see `transformers.SchedulerType`."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave non-finite losses out of the logs. Every step then waits for the device."},
    )
    ema_decay: float | None = field(
        default=0.9999,
        metadata={
            "help": "Decay of the moving average of the weights, warmed up as min(ema_decay, (1 + n) / (10 + n)). "
            "Evaluation and saved models use the averaged weights. `None` disables it."
        },
    )
    prompt_fraction: float = field(
        default=0.0,
        metadata={"help": "Fraction of the examples with known tokens, to train prompting and infilling."},
    )
    prompt_kinds: list[str] = field(
        default_factory=lambda: ["prefix", "infill", "random"],
        metadata={
            "help": "Patterns of known tokens in these examples, equally likely.",
            "choices": list(PROMPT_KINDS),
        },
    )
    confident_rounds: int = field(
        default=4, metadata={"help": "For the pattern confident: number of refinement rounds that commit all tokens."}
    )
    prompts_from_labels: bool = field(
        default=False, metadata={"help": "Tokens with label -100, except padding, are known."}
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata={"help": "Fraction of the examples whose known tokens become padding, for classifier-free guidance."},
    )
    eval_likelihood_times: int = field(
        default=0,
        metadata={"help": "Number of noise levels for the likelihood bound of evaluation examples; 0 disables it."},
    )
    sample_steps: int = field(
        default=0, metadata={"help": "Number of steps between samples in samples.jsonl; 0 disables them."}
    )
    sample_num_samples: int = field(default=4, metadata={"help": "Number of these samples."})
    sample_num_steps: int = field(default=32, metadata={"help": "Number of sampling steps of these samples."})
    eval_gen_ppl_steps: int = field(
        default=0, metadata={"help": "Number of steps between measurements of generative perplexity; 0 disables it."}
    )
    eval_gen_ppl_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 32], metadata={"help": "Numbers of sampling steps to measure."}
    )
    eval_gen_ppl_num_samples: int = field(default=256, metadata={"help": "Number of samples to measure."})
    eval_gen_ppl_model: str = field(
        default="gpt2-large", metadata={"help": "Causal language model that scores samples."}
    )

    def __getstate__(self):
        # `Trainer` pickles its arguments beside the model, without the token.
        return {**self.__dict__, "hub_token": None}

    @property
    def has_prompts(self) -> bool:
        """Whether examples have known tokens: drawn ones (`prompt_fraction`), or prompts (`prompts_from_labels`)."""
        return self.prompt_fraction > 0 or self.prompts_from_labels

    @property
    def selects_by_likelihood(self) -> bool:
        """Whether `metric_for_best_model` is the likelihood bound."""
        return (self.metric_for_best_model or "").removeprefix("eval_") in ("nll", "perplexity")

    @property
    def selects_by_gen_ppl(self) -> bool:
        """Whether `metric_for_best_model` is the generative perplexity or entropy of samples."""
        return re.fullmatch(r"(eval_)?(gen_ppl.*|entropy_\d+)", self.metric_for_best_model or "") is not None

    def _check_selection_by_gen_ppl(self):
        """Raises a `ValueError` if evaluations would not have the figure that `metric_for_best_model` names."""
        metric = self.metric_for_best_model
        needs = f"`metric_for_best_model={metric!r}` needs"
        names = [f"eval_{name}_{n}" for name in ("gen_ppl", "entropy") for n in self.eval_gen_ppl_num_steps]
        if self.eval_gen_ppl_steps < 1:
            raise ValueError(
                f"{needs} the figures of samples: pass `eval_gen_ppl_steps`, for example equal to `eval_steps`."
            )
        if f"eval_{metric.removeprefix('eval_')}" not in names:
            raise ValueError(
                f"{needs} its number of sampling steps to be one of `eval_gen_ppl_num_steps`: add it, or name one of "
                f"{', '.join(names)}."
            )
        if self.eval_strategy != "steps":
            raise ValueError(
                f"{needs} an evaluation at the steps where samples are scored: pass `eval_strategy='steps'` and "
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
            value = as_python(getattr(self, definition.name))
            setattr(self, definition.name, value)
            if type(definition.default) in (int, float) and isinstance(value, str):
                raise ValueError(f"`{definition.name}` must be a number, got the string {value!r}.")
        if self.selects_by_gen_ppl:
            self._check_selection_by_gen_ppl()
            if self.greater_is_better is None and "gen_ppl" in self.metric_for_best_model:
                self.greater_is_better = False  # the default of `TrainingArguments` is for scores
        if self.greater_is_better is None and self.selects_by_likelihood:
            self.greater_is_better = False
        super().__post_init__()
        check_numbers(self, _LEAST, _BELOW)
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            name = "max_steps" if self.max_steps == 0 else "num_train_epochs"
            raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}: pass `do_eval` to evaluate only.")
        if self.eval_likelihood_times != 0 and self.eval_likelihood_times < 2:
            raise ValueError(f"`eval_likelihood_times` must be at least 2, or 0, got {self.eval_likelihood_times}.")
        if self.selects_by_likelihood and self.eval_likelihood_times == 0:
            raise ValueError(
                f"`metric_for_best_model={self.metric_for_best_model!r}` needs the likelihood bound: pass "
                "`eval_likelihood_times`, such as 32."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, or `None`, got {self.ema_decay}.")
        for name in ("prompt_fraction", "prompt_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not self.prompt_kinds or not set(self.prompt_kinds) <= set(PROMPT_KINDS):
            raise ValueError(
                f"`prompt_kinds` must be a list of {', '.join(map(repr, PROMPT_KINDS))}, got {self.prompt_kinds!r}."
            )
        if not self.eval_gen_ppl_num_steps or min(self.eval_gen_ppl_num_steps) < 1:
            raise ValueError(
                f"`eval_gen_ppl_num_steps` must be numbers of at least 1, got {self.eval_gen_ppl_num_steps}."
            )
