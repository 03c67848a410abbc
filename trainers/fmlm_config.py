# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`FMLMTrainer`], and the paper's recipes as presets."""

from dataclasses import dataclass, field
from typing import Any

from modeling_flm.losses import DIVERGENCES

from .flm_config import FLMTrainingArguments, check_numbers


# Settings of the published training scripts, and of distribution matching.
PRESETS: dict[str, dict[str, Any]] = {
    # First stage: train the correction network of an `FMLMTwoNetworkModel`, with its flow frozen
    "two_network": {
        "target": "semigroup",
        "divergence": "squared_error",
        "diagonal_fraction": 0.0,
        "boundary_probability": 1 / 64,
    },
    # Second stage: distill the two networks into one `FMLMModel`
    "second_stage": {
        "target": "teacher",
        "divergence": "squared_error",
        "diagonal_fraction": 0.0,
        "boundary_probability": 1 / 128,
    },
    # Both stages at once (v2 of the paper): distill the FLM into an `FMLMModel`
    "single_stage": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
    },
    # The same from scratch, with the data instead of a teacher on the diagonal
    "self_distillation": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
        "self_distillation": True,
    },
    # The same for FMLM+, given any set of known tokens; for an `FMLMModel` with `per_token_timesteps=True`
    "any_order": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
        "prompt_fraction": 1.0,
        "prompt_kinds": ["independent"],
        "self_distillation": True,  # or with a teacher
    },
    # After one of the above: texts of few steps like the data's, for a `DistributionMatchingTrainer`
    "distribution_matching": {
        "target": "distribution_matching",
        "diagonal_fraction": 0.0,
        "boundary_probability": 0.5,
        "adam_beta1": 0.0,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "linear",
        "ema_decay": 0.995,
    },
}


def _choices(*values: str) -> dict[str, Any]:
    return {"choices": list(values)}


@dataclass
class FMLMTrainingArguments(FLMTrainingArguments):
    r"""
    Arguments of [`FMLMTrainer`], in addition to [`FLMTrainingArguments`].

    Parameters:
        target (`str`, *optional*, defaults to `"semigroup"`):
            Target of the two-time denoiser \\(\delta_{s,t}\\) where `s < t`:

            - `"semigroup"`: the composition of two shorter maps through an intermediate time.
            - `"lagrangian"`: the derivative of the map in `t`, projected to the simplex.
            - `"eulerian"`: the derivative of the map in `s` and the state. Needs `divergence="squared_error"` and
              `boundary_probability=0`.
            - `"teacher"`: the teacher, which is itself a flow map.
            - `"distribution_matching"`: texts that are distributed like the data's, for a [`DistributionMatchingTrainer`].
        divergence (`str`, *optional*, defaults to `"cross_entropy"`):
            Divergence of target and model per token: `"cross_entropy"`, `"kl"` (the same up to a constant) or
            `"squared_error"` (summed over the vocabulary).
        diagonal_fraction (`float`, *optional*, defaults to 0.5):
            Fraction of the examples with `s = t`, where the target is the teacher's denoiser or the data. Masked examples do not
            count (see `masked_probability`).
        boundary_probability (`float`, *optional*, defaults to 1/32):
            Probability that an off-diagonal pair (s, t) is (0, 1).
        masked_probability (`float`, *optional*, defaults to 0.0):
            Probability that an example is at time 0, with known tokens and pure noise, and learned from the `masked_teacher`, a
            masked diffusion model.
        time_sampling (`str`, *optional*, defaults to `"uniform_difference"`):
            Distribution of pairs of times. `"uniform_difference"` draws their difference `d` uniformly, then the start from
            [0, 1 - d]; `"uniform_pair"` draws both times uniformly.
        intermediate_time (`str`, *optional*, defaults to `"midpoint"`):
            Intermediate time of the semigroup target: the `"midpoint"`, or uniformly `"random"`.
        target_network (`str`, *optional*, defaults to `"student"`):
            Network of the targets: the `"student"`, or its moving average (`"ema"`).
        self_distillation (`bool`, *optional*, defaults to `False`):
            Whether an [`FMLMModel`] learns without a teacher: from the data where `s = t`, and from itself elsewhere. On in the
            presets `"self_distillation"` and `"any_order"`.
        teacher_iterations (`int`, *optional*, defaults to 1):
            Forward passes of a teacher with `self_conditioning` for a target, each with the estimate of the text of the one before.
            Three come close to the fixed point, which the flow map learns in a single pass. For the targets `"semigroup"` and
            `"distribution_matching"`.
        auxiliary_updates (`int`, *optional*, defaults to 2):
            Updates of the auxiliary denoiser before each update of the model, for [`DistributionMatchingTrainer`].
        auxiliary_learning_rate (`float`, *optional*):
            Learning rate of the auxiliary denoiser, which follows the schedule of the model's. By default `learning_rate`.
        num_start_times (`int`, *optional*, defaults to 8):
            Number of times to start from in distribution matching: 0 with `boundary_probability`, and otherwise one of the other
            multiples of 1 over this number.
    """

    target: str = field(
        default="semigroup",
        metadata={
            "help": "Target of the two-time denoiser off the diagonal.",
            **_choices("semigroup", "lagrangian", "eulerian", "teacher", "distribution_matching"),
        },
    )
    divergence: str = field(
        default="cross_entropy",
        metadata={"help": "Divergence of target and model.", **_choices(*DIVERGENCES)},
    )
    diagonal_fraction: float = field(default=0.5, metadata={"help": "Fraction of the examples with s = t."})
    boundary_probability: float = field(
        default=1 / 32, metadata={"help": "Probability that an off-diagonal pair (s, t) is (0, 1)."}
    )
    masked_probability: float = field(
        default=0.0,
        metadata={
            "help": "Probability that an example starts at time 0 and is trained on the masked teacher's predictions."
        },
    )
    time_sampling: str = field(
        default="uniform_difference",
        metadata={"help": "Distribution of pairs of times.", **_choices("uniform_difference", "uniform_pair")},
    )
    intermediate_time: str = field(
        default="midpoint",
        metadata={"help": "Intermediate time of the semigroup target.", **_choices("midpoint", "random")},
    )
    target_network: str = field(
        default="student", metadata={"help": "Network of the targets.", **_choices("student", "ema")}
    )
    self_distillation: bool = field(
        default=False, metadata={"help": "Learn without a teacher, from the data and the flow map itself."}
    )
    teacher_iterations: int = field(
        default=1, metadata={"help": "Forward passes of a teacher with self-conditioning for a target."}
    )
    auxiliary_updates: int = field(
        default=2,
        metadata={"help": "Distribution matching: updates of the auxiliary denoiser per update of the model."},
    )
    auxiliary_learning_rate: float | None = field(
        default=None, metadata={"help": "Distribution matching: its learning rate. By default that of the model."}
    )
    num_start_times: int = field(
        default=8, metadata={"help": "Distribution matching: number of times to start from, evenly spaced from 0."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name, definition in self.__dataclass_fields__.items():
            choices = definition.metadata.get("choices")
            if name in FMLMTrainingArguments.__annotations__ and choices and getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("diagonal_fraction", "boundary_probability", "masked_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        least = dict.fromkeys(("teacher_iterations", "auxiliary_updates", "num_start_times"), 1)
        check_numbers(self, {**least, "auxiliary_learning_rate": 0})
        if self.teacher_iterations > 1 and self.target not in ("semigroup", "distribution_matching"):
            raise ValueError(f"`teacher_iterations` has no effect with `target={self.target!r}`: leave it out.")
        if self.num_start_times == 1 and self.target == "distribution_matching" and self.boundary_probability < 1:
            raise ValueError("`num_start_times=1` starts from noise only: it needs `boundary_probability=1`.")
        if self.target == "eulerian":
            if self.divergence != "squared_error":
                raise ValueError("`target='eulerian'` may leave the simplex: it needs `divergence='squared_error'`.")
            if self.boundary_probability > 0:
                raise ValueError("`target='eulerian'` is undefined at t = 1: it needs `boundary_probability=0`.")
        if self.target_network == "ema" and self.ema_decay is None:
            raise ValueError("`target_network='ema'` needs a moving average: set `ema_decay`.")

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "FMLMTrainingArguments":
        """
        Returns the arguments of one of the paper's recipes.

        Args:
            preset (`str`):
                `"two_network"`, `"second_stage"`, `"single_stage"`, `"self_distillation"`, `"any_order"` or
                `"distribution_matching"`.
            overrides: Further arguments, which override the preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        return cls(**{**PRESETS[preset], **overrides})
