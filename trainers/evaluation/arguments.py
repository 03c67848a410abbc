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
"""What an evaluation measures, and what the published one did."""

from dataclasses import dataclass, field

from modeling_flm import FLMGenerationConfig


# The parameters of loops around the sampler
LOOPS = ("num_rounds", "commit_threshold", "commit_budget", "block_length", "fresh_noise")

# What `generate()` takes for every number of steps.
GENERATION = ("length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos", *LOOPS)

# What the published evaluation did, and how to say it of a flag that contradicts it.
PUBLISHED = {
    "keep_special_tokens": (True, "keeps special tokens in the texts"),
    "max_length": (None, "cuts texts at the length of the model"),
    "length": (None, "has texts of the length of the model"),
    "pad_after_eos": (False, "counts all tokens of the model"),
    "scorer_dtype": ("float32", "scores in float32"),
}


@dataclass
class EvaluationArguments:
    """What to measure."""

    model: str = field(metadata={"help": "Name of a model of the Hub, or its folder."})
    output_dir: str = field(metadata={"help": "Where to write the texts, the table and the plot."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    protocol: str | None = field(
        default=None, metadata={"help": "published measures as the paper does.", "choices": ["published"]}
    )
    num_steps: list[int] | None = field(
        default=None, metadata={"help": "Numbers of sampling steps. By default 1, 2, 4 and 8."}
    )
    timesteps: list[float] | None = field(
        default=None,
        metadata={"help": "Reparameterized times of the steps, from 0 to 1, in the place of --num_steps."},
    )
    num_samples: int = field(default=1024, metadata={"help": "Texts for each number of steps and each seed."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the noise; their texts are pooled."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts at a time, which does not change them."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Top-k of sampling."})
    top_p: float | None = field(default=None, metadata={"help": "Top-p of sampling."})
    gamma: float | None = field(
        default=None, metadata={"help": "Share of the noise that is drawn anew at every step, 0 to 1."}
    )
    num_rounds: int | None = field(
        default=None, metadata={"help": "Rounds of posterior refinement, each of --num_steps."}
    )
    commit_threshold: float | None = field(
        default=None, metadata={"help": "Keep tokens of at least this probability after a round."}
    )
    commit_budget: str | None = field(
        default=None, metadata={"help": "How many to keep after a round in any case: a number, or uniform."}
    )
    block_length: int | None = field(
        default=None, metadata={"help": "Write from left to right, so many tokens at a time, each in --num_steps."}
    )
    fresh_noise: bool | None = field(
        default=None,
        metadata={"help": "New noise for what is written again, which is the default; false keeps the old."},
    )
    guidance_model: str | None = field(
        default=None, metadata={"help": "Name or folder of a worse model to move away from."}
    )
    guidance_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of that model."})
    guidance_scale: float | None = field(default=None, metadata={"help": "How far to move away from it, such as 2."})
    length: int | None = field(default=None, metadata={"help": "Tokens of each text."})
    pad_after_eos: bool | None = field(
        default=None, metadata={"help": "End texts at their first end token.", "nargs": "?", "const": True}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the model, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Such as sdpa or flash_attention_2."})
    keep_special_tokens: bool | None = field(
        default=None, metadata={"help": "Score special tokens as text, too.", "nargs": "?", "const": True}
    )
    scorer: str = field(default="gpt2-large", metadata={"help": "Causal language model that scores the texts."})
    scorer_batch_size: int = field(default=8, metadata={"help": "Texts to score at a time."})
    scorer_dtype: str | None = field(default=None, metadata={"help": "Precision of the scorer, such as bfloat16."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text that count; see the metric."})
    reference_file: str | None = field(
        default=None,
        metadata={"help": "A txt, jsonl, csv or parquet file of texts to compare with, cut to the model's length."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column of --reference_file with the texts."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples for the 95 %% confidence intervals."})
    update_card: bool = field(default=False, metadata={"help": "Write the results into the model's card."})


def check_arguments(args: EvaluationArguments):
    """
    Fills in what follows from other arguments.

    Args:
        args ([`EvaluationArguments`]): Changed in place.

    Raises:
        `ValueError`: for arguments that cannot be used, with their names in backticks.
    """
    if args.timesteps is not None:
        if args.num_steps is not None:
            raise ValueError("`timesteps` sets the number of steps: leave out `num_steps`, also that of a YAML file")
        args.num_steps = [len(args.timesteps) - 1]
    if isinstance(args.commit_budget, str) and args.commit_budget.isdigit():
        args.commit_budget = int(args.commit_budget)
    FLMGenerationConfig(**{name: getattr(args, name) for name in (*GENERATION, "timesteps")})
    args.num_steps = [1, 2, 4, 8] if args.num_steps is None else args.num_steps
    counts = ("num_samples", "batch_size", "scorer_batch_size", "bootstrap")
    if min(*args.num_steps, *(getattr(args, name) for name in counts)) < 1:
        raise ValueError(f"`num_steps`, {', '.join(f'`{name}`' for name in counts)} must be at least 1.")
    for name in ("num_steps", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"`{name}` must be different from each other, got {getattr(args, name)}.")
    if args.guidance_model is None:
        for name in ("guidance_scale", "guidance_revision"):
            if getattr(args, name) not in (None, "main"):
                raise ValueError(f"`{name}` needs `guidance_model`: pass the name or folder of a worse model.")
    if args.protocol == "published":
        for name, (value, meaning) in PUBLISHED.items():
            if getattr(args, name) not in (None, value):
                raise ValueError(f"`{name}`: `protocol` published {meaning}; leave out one of them.")
            setattr(args, name, value)
    args.keep_special_tokens = bool(args.keep_special_tokens)
