# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures, and what the published one did."""

from dataclasses import dataclass, field

from modeling_flm import FLMGenerationConfig

from .repetition import NGRAM_SIZES


# The parameters of loops around the sampler
LOOPS = ("num_rounds", "commit_threshold", "commit_budget", "block_length", "fresh_noise")

# The values of `samplers`
SAMPLERS = ("flow_map", "bridge")

# What `generate()` takes for every number of steps.
GENERATION = ("length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos", *LOOPS)

# What says nothing where a causal language model writes the texts, and what where they come from a file.
FLOW_ONLY = ("num_steps", "timestep_grid", "samplers", "gamma", *LOOPS, "guidance_model", "guidance_scale")
MODEL_ONLY = (
    *(
        "model",
        "protocol",
        *FLOW_ONLY,
        "temperature",
        "temperatures",
        "top_k",
        "top_p",
        "pad_after_eos",
        "batch_sizes",
    ),
    *("attn_implementation", "keep_special_tokens"),
)

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

    output_dir: str = field(metadata={"help": "Where to write the texts, the tables and the plot."})
    model: str | None = field(
        default=None,
        metadata={"help": "Name of a model of the Hub, or its folder: flow-based, or any causal language model."},
    )
    samples_file: str | None = field(
        default=None,
        metadata={"help": "A txt, json, jsonl, csv or parquet file of texts to measure in the place of a model's."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    protocol: str | None = field(
        default=None, metadata={"help": "published measures as the paper does.", "choices": ["published"]}
    )
    num_steps: list[int] | None = field(
        default=None, metadata={"help": "Numbers of sampling steps. By default 1, 2, 4 and 8."}
    )
    timestep_grid: list[float] | None = field(
        default=None,
        metadata={"help": "Reparameterized times of the steps, from 0 to 1, in the place of --num_steps."},
    )
    num_samples: int = field(default=1024, metadata={"help": "Texts for each number of steps and each seed."})
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of the noise; their texts are pooled."}
    )
    batch_size: int = field(
        default=64,
        metadata={"help": "Texts at a time, which does not change those of a flow-based model."},
    )
    batch_sizes: list[int] | None = field(
        default=None, metadata={"help": "Measure also texts and tokens a second, with each of these batch sizes."}
    )
    samplers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Samplers to compare: flow_map follows the flow, with --gamma; bridge draws tokens at every step.",
            "choices": [*SAMPLERS],
        },
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling."})
    temperatures: list[float] | None = field(
        default=None,
        metadata={"help": "Several temperatures, for the frontier of perplexity and entropy, such as 0.7 0.8 0.9 1."},
    )
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
    reference_packing: str = field(
        default="texts",
        metadata={
            "help": "Each of these texts by itself, cut where it is too long; or blocks of the model's length, as in training.",
            "choices": ["texts", "wrapped"],
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A file like it of the training texts, to find what was copied from them."}
    )
    text_column: str | None = field(default=None, metadata={"help": "The column of these files with the texts."})
    ngram_sizes: list[int] = field(
        default_factory=lambda: [*NGRAM_SIZES], metadata={"help": "Sizes of n-grams that may be copied, in words."}
    )
    words_file: str | None = field(
        default=None,
        metadata={"help": "A list of real words, one a line. By default those of --train_file, if there is one."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer for the entropy and the distinct n-grams, to compare models that have different ones. By "
            "default the model's, and for --samples_file the scorer's."
        },
    )
    mauve_model: str | None = field(
        default=None,
        metadata={"help": "Causal language model with whose embeddings to measure MAUVE against --reference_file."},
    )
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
    if (args.model is None) == (args.samples_file is None):
        raise ValueError("Pass either `model` or `samples_file`, and not both.")
    if args.samples_file is not None:
        if useless := [name for name in MODEL_ONLY if getattr(args, name) is not None]:
            raise ValueError(f"`samples_file` has texts already: leave out `{'`, `'.join(useless)}`.")
        if args.length is not None and args.tokenizer is None:
            raise ValueError("`length` cuts the texts of `samples_file` in tokens of `tokenizer`: pass one.")
        if args.reference_packing == "wrapped" and args.length is None:
            raise ValueError("`reference_packing` wrapped makes blocks of `length` tokens: pass it.")
    if args.mauve_model is not None and args.reference_file is None:
        raise ValueError("`mauve_model` needs `reference_file`, whose texts it compares with.")
    if args.temperatures is not None and args.temperature is not None:
        raise ValueError("`temperatures` are several, `temperature` is one: leave out one of them.")
    if args.samplers == ["bridge"] and args.gamma:
        raise ValueError("`gamma` is about `samplers` flow_map, and bridge has none: leave it out.")
    if args.update_card:
        for name in ("samples_file", "temperatures", "tokenizer"):
            if getattr(args, name) is not None:
                raise ValueError(f"`update_card` writes one figure for each number of steps: leave out `{name}`.")
        if args.samplers is not None and len(args.samplers) > 1:
            raise ValueError("`update_card` writes one figure for each number of steps: pass one of `samplers`.")
    if args.timestep_grid is not None:
        if args.num_steps is not None:
            raise ValueError(
                "`timestep_grid` sets the number of steps: leave out `num_steps`, also that of a YAML file"
            )
        args.num_steps = [len(args.timestep_grid) - 1]
    if isinstance(args.commit_budget, str) and args.commit_budget.isdigit():
        args.commit_budget = int(args.commit_budget)
    FLMGenerationConfig(**{name: getattr(args, name) for name in (*GENERATION, "timestep_grid")})
    if not all(temperature > 0 for temperature in args.temperatures or []):
        raise ValueError(f"`temperatures` must be above 0, got {args.temperatures}.")
    args.num_steps = [1, 2, 4, 8] if args.num_steps is None else args.num_steps
    counts = ("num_samples", "batch_size", "scorer_batch_size", "bootstrap")
    if min(*args.num_steps, *(getattr(args, name) for name in counts)) < 1:
        raise ValueError(f"`num_steps`, {', '.join(f'`{name}`' for name in counts)} must be at least 1.")
    for name in ("ngram_sizes", "batch_sizes"):
        if min(getattr(args, name) or [1]) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}.")
    for name in ("num_steps", "seeds", "temperatures", "samplers", "batch_sizes", "ngram_sizes"):
        if len(set(getattr(args, name) or [])) < len(getattr(args, name) or []):
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
