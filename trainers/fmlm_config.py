# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`FMLMTrainer`], and the paper's recipes as presets."""

from dataclasses import dataclass, field
from typing import Any

from modeling_flm.losses import DIVERGENCES

from .flm_config import FLMTrainingArguments


# What the published training scripts do.
PRESETS: dict[str, dict[str, Any]] = {
    # First stage: the correction network of an `FMLMTwoNetworkModel` beside the frozen flow
    "two_network": {
        "target": "semigroup",
        "divergence": "squared_error",
        "diagonal_fraction": 0.0,
        "boundary_probability": 1 / 64,
    },
    # Second stage: an `FMLMModel` that imitates the two networks
    "second_stage": {
        "target": "teacher",
        "divergence": "squared_error",
        "diagonal_fraction": 0.0,
        "boundary_probability": 1 / 128,
    },
    # Both at once (v2 of the paper): an `FMLMModel`, from the FLM
    "single_stage": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
    },
    # The same from scratch: on the diagonal the data takes the place of the teacher
    "self_distillation": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
        "self_distillation": True,
    },
    # The same for FMLM+: in any order, from any tokens that are known; for an `FMLMModel` that is told the time of each token
    "any_order": {
        "target": "semigroup",
        "divergence": "cross_entropy",
        "diagonal_fraction": 0.5,
        "boundary_probability": 1 / 32,
        "prompt_fraction": 1.0,
        "prompt_kinds": ["independent"],
        "self_distillation": True,  # or with a teacher
    },
}


def _choices(*values: str) -> dict[str, Any]:
    return {"choices": list(values)}


@dataclass
class FMLMTrainingArguments(FLMTrainingArguments):
    r"""
    Arguments of [`FMLMTrainer`]: those of [`FLMTrainingArguments`], and the ones below.

    Parameters:
        target (`str`, *optional*, defaults to `"semigroup"`):
            What the two-time denoiser \\(\delta_{s,t}\\) is trained towards where `s < t`:

            - `"semigroup"`: the composition of two shorter maps through an intermediate time.
            - `"lagrangian"`: the derivative of the map in `t`, projected to the simplex.
            - `"eulerian"`: the derivative of the map in `s` and the state. Needs `divergence="squared_error"` and
              `boundary_probability=0`.
            - `"teacher"`: the teacher, itself a flow map.
        divergence (`str`, *optional*, defaults to `"cross_entropy"`):
            Between target and model, per token: `"cross_entropy"`, `"kl"`, which is the same up to a constant, or
            `"squared_error"`, summed over the vocabulary.
        diagonal_fraction (`float`, *optional*, defaults to 0.5):
            The share of the examples with `s = t`, where the target is the teacher's denoiser, or the data; of those that
            `masked_probability` leaves.
        boundary_probability (`float`, *optional*, defaults to 1/32):
            How often a pair of different times is the whole way from 0 to 1.
        masked_probability (`float`, *optional*, defaults to 0.0):
            The share of the examples that are at the very beginning, where tokens are known or pure noise, and learned from
            the `masked_teacher`, a masked diffusion model.
        time_sampling (`str`, *optional*, defaults to `"uniform_difference"`):
            `"uniform_difference"` draws the difference `d` of the times uniformly, then the start from [0, 1 - d];
            `"uniform_pair"` draws both times uniformly.
        intermediate_time (`str`, *optional*, defaults to `"midpoint"`):
            The intermediate time of the semigroup target, `"midpoint"` or uniformly `"random"`.
        target_network (`str`, *optional*, defaults to `"student"`):
            The network in the targets: the `"student"`, or its moving average, `"ema"`.
        self_distillation (`bool`, *optional*, defaults to `False`):
            Whether an [`FMLMModel`] may learn without a teacher, from the data where `s = t` and otherwise from itself.
            The presets `"self_distillation"` and `"any_order"` do.
    """

    target: str = field(
        default="semigroup",
        metadata={"help": "What to train towards.", **_choices("semigroup", "lagrangian", "eulerian", "teacher")},
    )
    divergence: str = field(
        default="cross_entropy",
        metadata={"help": "Between target and model.", **_choices(*DIVERGENCES)},
    )
    diagonal_fraction: float = field(default=0.5, metadata={"help": "The share of examples with s = t."})
    boundary_probability: float = field(
        default=1 / 32, metadata={"help": "How often a pair of different times is the whole way from 0 to 1."}
    )
    masked_probability: float = field(
        default=0.0, metadata={"help": "The share of examples at noise that are learned from a masked teacher."}
    )
    time_sampling: str = field(
        default="uniform_difference",
        metadata={"help": "How pairs of times are drawn.", **_choices("uniform_difference", "uniform_pair")},
    )
    intermediate_time: str = field(
        default="midpoint",
        metadata={"help": "The intermediate time of the semigroup target.", **_choices("midpoint", "random")},
    )
    target_network: str = field(
        default="student", metadata={"help": "The network in the targets.", **_choices("student", "ema")}
    )
    self_distillation: bool = field(
        default=False, metadata={"help": "Learn without a teacher, from the data and the flow map itself."}
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
        if self.target == "eulerian":
            if self.divergence != "squared_error":
                raise ValueError("`target='eulerian'` leaves the simplex: it needs `divergence='squared_error'`.")
            if self.boundary_probability > 0:
                raise ValueError("`target='eulerian'` is undefined at t = 1: it needs `boundary_probability=0`.")
        if self.target_network == "ema" and self.ema_decay is None:
            raise ValueError("`target_network='ema'` needs an average: set `ema_decay`.")

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "FMLMTrainingArguments":
        """
        The arguments of one of the paper's recipes.

        Args:
            preset (`str`):
                `"two_network"`, `"second_stage"`, `"single_stage"`, `"self_distillation"` or `"any_order"`.
            overrides: Further arguments, which take precedence.
        """
        if preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        return cls(**{**PRESETS[preset], **overrides})
