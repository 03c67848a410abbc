# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
r"""
Evaluate a model or texts: generative perplexity, entropy, diversity, copies of training texts, and time.

    flm-evaluate --model outputs/fmlm --num_steps 1 2 4 8 --output_dir outputs/fmlm_evaluation
    accelerate launch -m modeling_flm.trainers.commands.evaluate --model me/flm --num_steps 32 128 1024 --output_dir outputs/flm_evaluation
    flm-evaluate --model me/fmlm --num_steps 4 16 --samplers flow_map bridge --temperatures 0.7 0.8 0.9 1 \
        --reference_file heldout.txt --train_file train.txt --output_dir outputs/frontier
    flm-evaluate --model gpt2 --length 128 --temperatures 0.8 0.9 1 --output_dir outputs/gpt2
    flm-evaluate --samples_file texts.jsonl --reference_file heldout.txt --output_dir outputs/texts
    flm-evaluate --model me/fmlm --gamma 0.8 --protocol published --output_dir outputs/as_published

Sampling parameters default to the model's `generation_config.json`. --temperatures plots the frontier of perplexity and entropy
for each number of steps and sampler (`frontier.png`). With --reference_file it also gives the perplexity at the entropy of the
reference texts: compare models by that figure. --train_file finds copied n-grams and texts, and counts real words; --mauve_model
adds MAUVE; --batch_sizes adds texts per second. --protocol published measures as the paper does, for figures that are compared
with the paper's: special tokens stay in the texts, texts are truncated at the model's length in tokens of the scorer, and GPT-2
large scores 1024 texts in float32.

The output directory gets the texts (`samples_N.jsonl` for N steps), the tables (`results.md` and `results.json`), and a plot of
quality against time, or the frontier. If the command fails in the middle, `partial_results.json` has what was measured. --reference_file
adds a row for the reference texts. --update_card stores the results with the model: in its folder, where `flm-publish` finds them, or
in its card on the Hub. Flags can also be set in a YAML file, given as the first argument. Needs `pip install modeling-flm[evaluate]`.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.hf_argparser import HfArg

from modeling_flm import FLMGenerationConfig
from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.hub.card import add_results, check_results_can_be_added
from modeling_flm.hub.loading import load_checked
from modeling_flm.hub.records import to_json
from modeling_flm.pipeline_flm import encode_texts

from ..data.loading import is_text_file
from ..evaluation import (
    CausalSource,
    FlowSource,
    Setting,
    Texts,
    check_figures,
    embed_texts,
    generate_texts,
    load_check,
    load_lines,
    load_source,
    mauve_figures,
    measure_throughput,
    read_texts,
    repetition_figures,
    report,
    score,
    vocabulary_of,
)
from ..evaluation.mauve import check_mauve
from ..evaluation.plots import check_plots
from ..evaluation.repetition import NGRAM_SIZES
from ..evaluation.report import without_texts
from ..evaluation.sources import GENERATION_PARAMETERS, LOOP_PARAMETERS, SAMPLERS, is_flow_based
from ..evaluation.words import split_words
from .command_line import ScriptParser, check_model, errors_about, friendly_errors


# Arguments that do not apply to causal models, and to texts from a file.
FLOW_ONLY = ("num_steps", "timestep_grid", "samplers", "gamma", *LOOP_PARAMETERS, "guidance_model", "guidance_scale")
MODEL_ONLY = (
    *("protocol", *FLOW_ONLY, "temperature", "temperatures", "top_k", "top_p", "pad_after_eos", "batch_sizes"),
    *("attn_implementation", "keep_special_tokens"),
)

# Settings of the published evaluation, and their words in error messages.
PUBLISHED = {
    "keep_special_tokens": (True, "keeps special tokens in the texts"),
    "max_length": (None, "truncates texts at the model's length"),
    "length": (None, "generates texts of the model's length"),
    "pad_after_eos": (False, "counts all tokens of the model"),
    "scorer_dtype": ("float32", "scores in float32"),
}

# Settings that change the figures, in the order in which they are reported.
_REPORTED = (
    *("protocol", "sampler", "gamma", "temperature", "top_k", "top_p", "timestep_grid", "length", "pad_after_eos"),
    *LOOP_PARAMETERS,
    *("guidance_model", "guidance_revision", "guidance_scale"),
    *("max_length", "keep_special_tokens", "scorer_dtype", "dtype", "revision", "tokenizer"),
)


@dataclass
class EvaluationArguments:
    """Arguments of `flm-evaluate`."""

    output_dir: str = HfArg(help="Folder for texts, tables and plot.")
    model: str | None = HfArg(
        default=None, help="Name of a model on the Hub, or its folder: flow-based, or any causal language model."
    )
    samples_file: str | None = HfArg(
        default=None,
        help="A txt, json, jsonl, csv, tsv or parquet file, or a folder, of texts to score instead of a model's.",
    )
    revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    protocol: str | None = HfArg(
        default=None, help="published: evaluate exactly as the paper does.", metadata={"choices": ["published"]}
    )
    num_steps: list[int] | None = HfArg(default=None, help="Numbers of sampling steps. By default 1, 2, 4 and 8.")
    timestep_grid: list[float] | None = HfArg(
        default=None, help="Reparameterized times of the steps, from 0 to 1, instead of --num_steps."
    )
    num_samples: int = HfArg(default=1024, help="Texts for each number of steps and each seed.")
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Seeds. Their texts are pooled.")
    batch_size: int = HfArg(default=64, help="Texts per batch. It does not change the texts.")
    batch_sizes: list[int] | None = HfArg(
        default=None, help="Also measure texts and tokens per second, with each of these batch sizes."
    )
    samplers: list[str] | None = HfArg(
        default=None,
        help="Samplers to compare: flow_map follows the flow, with --gamma; bridge draws tokens at every step.",
        metadata={"choices": [*SAMPLERS]},
    )
    temperature: float | None = HfArg(default=None, help="Sampling temperature.")
    temperatures: list[float] | None = HfArg(
        default=None, help="Temperatures for the frontier of perplexity and entropy, such as 0.7 0.8 0.9 1."
    )
    top_k: int | None = HfArg(default=None, help="Sample from the k most likely tokens only.")
    top_p: float | None = HfArg(default=None, help="Sample from the smallest set of tokens with this probability.")
    gamma: float | None = HfArg(default=None, help="Share of fresh noise at every step, from 0 (none) to 1 (all).")
    num_rounds: int | None = HfArg(default=None, help="Number of refinement rounds, each of --num_steps steps.")
    commit_threshold: float | None = HfArg(
        default=None, help="Commit tokens with at least this probability after each round."
    )
    commit_budget: str | None = HfArg(
        default=None, help="Tokens to commit after each round in any case: a number, or uniform."
    )
    block_length: int | None = HfArg(
        default=None, help="Generate left to right in blocks of this many tokens, each in --num_steps steps."
    )
    fresh_noise: bool | None = HfArg(
        default=None,
        help="Whether later rounds or blocks start from new noise (the default), or with false from the same.",
    )
    guidance_model: str | None = HfArg(default=None, help="Name or folder of a weaker model for autoguidance.")
    guidance_revision: str = HfArg(default="main", help="Branch, tag or commit of the guidance model.")
    guidance_scale: float | None = HfArg(default=None, help="Strength of the guidance, such as 2.")
    length: int | None = HfArg(default=None, help="Number of tokens of each text.")
    pad_after_eos: bool | None = HfArg(
        default=None, help="End texts at their first EOS token.", metadata={"nargs": "?", "const": True}
    )
    dtype: str = HfArg(default="auto", help="Precision of the model, such as bfloat16.")
    attn_implementation: str | None = HfArg(
        default=None, help="Attention implementation, such as sdpa or flash_attention_2."
    )
    keep_special_tokens: bool | None = HfArg(
        default=None, help="Keep special tokens in the scored texts.", metadata={"nargs": "?", "const": True}
    )
    scorer: str = HfArg(default="gpt2-large", help="Causal language model that scores the texts.")
    scorer_batch_size: int = HfArg(default=8, help="Texts per forward pass of the scorer.")
    scorer_dtype: str | None = HfArg(default=None, help="Precision of the scorer, such as bfloat16.")
    max_length: int | None = HfArg(
        default=None, help="Tokens of each text that the scorer reads. By default 1024, or its context if shorter."
    )
    reference_file: str | None = HfArg(
        default=None,
        help="A txt, jsonl, csv, tsv or parquet file, or a folder, of reference texts, truncated to the model's length.",
    )
    reference_packing: str = HfArg(
        default="texts",
        help="texts truncates each reference text; wrapped packs them into blocks of the model's length, as in training.",
        metadata={"choices": ["texts", "wrapped"]},
    )
    train_file: str | None = HfArg(
        default=None,
        help="A txt, jsonl, csv, tsv or parquet file, or a folder, of training texts, to find copies of them.",
    )
    text_column: str | None = HfArg(default=None, help="Column with the texts in these files.")
    ngram_sizes: list[int] = HfArg(
        default_factory=lambda: [*NGRAM_SIZES],
        help="N-gram sizes of copies, in words; in characters for scripts without spaces.",
    )
    words_file: str | None = HfArg(
        default=None, help="A list of real words, one per line. By default the words of --train_file."
    )
    check: str | None = HfArg(
        default=None,
        help="A test of your own, such as checks.py:is_valid: a function that returns whether a text passes. The table has the share.",
    )
    tokenizer: str | None = HfArg(
        default=None,
        help="Tokenizer for entropy and distinct n-grams, to compare models with different tokenizers. By default the "
        "model's, and the scorer's for --samples_file.",
    )
    mauve_model: str | None = HfArg(
        default=None, help="Causal language model whose embeddings are used for MAUVE against --reference_file."
    )
    bootstrap: int = HfArg(default=1000, help="Resamples for the 95 %% confidence intervals.")
    update_card: bool = HfArg(default=False, help="Store the results in the model's card.")


def make_parser() -> ScriptParser:
    return ScriptParser([EvaluationArguments], positional="model", description=__doc__)


def check_arguments(args: EvaluationArguments):
    """Raises a `ValueError` for arguments that cannot be used, with their names in backticks."""
    if (args.model is None) == (args.samples_file is None):
        raise ValueError("Pass either `model` or `samples_file`, and not both.")
    if args.samples_file is not None:
        if extra := [name for name in MODEL_ONLY if getattr(args, name) is not None]:
            raise ValueError(f"`samples_file` has texts already. Remove `{'`, `'.join(extra)}`.")
        if args.length is not None and args.tokenizer is None:
            raise ValueError("`length` truncates the texts of `samples_file` in tokens of `tokenizer`: pass one.")
        if args.reference_packing == "wrapped" and args.length is None:
            raise ValueError("`reference_packing` wrapped makes blocks of `length` tokens: pass it.")
    if args.mauve_model is not None and args.reference_file is None:
        raise ValueError("`mauve_model` needs `reference_file`, the texts to compare with.")
    if args.temperatures is not None and args.temperature is not None:
        raise ValueError("Pass either `temperatures` or `temperature`, and not both.")
    if args.samplers == ["bridge"] and args.gamma:
        raise ValueError("`gamma` applies to `samplers` flow_map only. Remove it.")
    if args.update_card:
        for name in ("samples_file", "temperatures", "tokenizer"):
            if getattr(args, name) is not None:
                raise ValueError(f"`update_card` stores one figure for each number of steps: remove `{name}`.")
        if args.samplers is not None and len(args.samplers) > 1:
            raise ValueError("`update_card` stores one figure for each number of steps: pass one of `samplers`.")
    if args.timestep_grid is not None and args.num_steps is not None:
        raise ValueError("`timestep_grid` sets the number of steps: remove `num_steps`, also from the YAML file.")
    if not all(temperature > 0 for temperature in args.temperatures or []):
        raise ValueError(f"`temperatures` must be above 0, got {args.temperatures}.")
    for name in ("num_samples", "batch_size", "scorer_batch_size", "bootstrap"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}.")
    for name in ("num_steps", "ngram_sizes", "batch_sizes"):
        if min(getattr(args, name) or [1]) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}.")
    for name in ("num_steps", "seeds", "temperatures", "samplers", "batch_sizes", "ngram_sizes"):
        if len(set(getattr(args, name) or [])) < len(getattr(args, name) or []):
            raise ValueError(f"`{name}` must be different from each other, got {getattr(args, name)}.")
    if args.guidance_model is None:
        for name in ("guidance_scale", "guidance_revision"):
            if getattr(args, name) not in (None, "main"):
                raise ValueError(f"`{name}` needs `guidance_model`: pass the name or folder of a weaker model.")
    for name, (value, meaning) in PUBLISHED.items() if args.protocol == "published" else ():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"`{name}`: `protocol` published {meaning}; remove one of them.")
    FLMGenerationConfig(**generate_kwargs(complete_arguments(args)))


def complete_arguments(args: EvaluationArguments) -> EvaluationArguments:
    """Returns a copy of the arguments with defaults filled in, and with what `timestep_grid` and `protocol` imply."""
    num_steps = args.num_steps or ([1, 2, 4, 8] if args.timestep_grid is None else [len(args.timestep_grid) - 1])
    budget = int(args.commit_budget) if str(args.commit_budget).isdigit() else args.commit_budget
    values = {"num_steps": num_steps, "commit_budget": budget, "keep_special_tokens": bool(args.keep_special_tokens)}
    if args.protocol == "published":
        values |= {name: value for name, (value, _) in PUBLISHED.items()}
    return replace(args, **values)


def generate_kwargs(args: EvaluationArguments) -> dict[str, Any]:
    """Returns the parameters of `generate()` that all rows share."""
    values = {name: getattr(args, name) for name in (*GENERATION_PARAMETERS, "timestep_grid")}
    return {name: value for name, value in values.items() if value is not None}


def check_causal_arguments(args: EvaluationArguments):
    """Raises a `ValueError` for arguments that do not apply to causal models."""
    if names := [name for name in FLOW_ONLY if getattr(args, name) is not None]:
        raise ValueError(f"`{'`, `'.join(names)}` do not apply to causal language models. Remove them.")
    if args.update_card:
        raise ValueError("`update_card` does not apply to causal language models. Remove it.")


def make_settings(args: EvaluationArguments, source: FlowSource | CausalSource) -> list[Setting]:
    """Returns the settings of the rows. Raises a `ValueError` for temperatures that have no effect."""
    temperatures = args.temperatures or [None]
    if isinstance(source, CausalSource):
        return [Setting(temperature=temperature) for temperature in temperatures]
    settings = [Setting(*values) for values in product(args.num_steps, args.samplers or [None], temperatures)]
    if args.temperatures is not None and not all(map(source.has_temperature, settings)):
        raise ValueError(
            "`temperatures` have no effect in one step of the flow map, which takes the most likely tokens: remove 1 from "
            "`num_steps`, or pass `samplers` bridge."
        )
    return settings


def describe(args: EvaluationArguments, source: FlowSource | CausalSource | None) -> dict[str, Any]:
    """Returns how texts are generated and scored: the parameters in effect that differ from the defaults."""
    names = ("protocol", "max_length", "scorer_dtype", "tokenizer")
    values = {name: getattr(args, name) for name in names}
    values["keep_special_tokens"] = args.keep_special_tokens or None
    if source is None:
        values["length"] = args.length
    else:
        samplers = args.samplers or [None]
        values |= source.describe(samplers[0] if len(samplers) == 1 else "flow_map")
        values["revision"] = None if args.revision == "main" else args.revision
        if "guidance_model" in values and args.guidance_revision != "main":
            values["guidance_revision"] = args.guidance_revision
    return {name: values[name] for name in _REPORTED if values.get(name) is not None}


def check_scorer(args: EvaluationArguments):
    """Raises a `ValueError` for a flow-based scorer, and for one with a context shorter than the published protocol's."""
    with errors_about("scorer", OSError):
        config = load_checked(AutoConfig, args.scorer)
    if config.model_type in FLOW_MODEL_TYPES:
        raise ValueError("`scorer` must be a causal language model, such as gpt2-large, and not a flow-based one.")
    context = getattr(config, "max_position_embeddings", None)
    if args.protocol == "published" and context is not None and context < args.max_length:
        raise ValueError(
            f"`protocol` published truncates texts at the model's {args.max_length} tokens, but `scorer` reads {context}: "
            "pass one that reads more."
        )


def check_mauve_arguments(
    args: EvaluationArguments, source: FlowSource | CausalSource | None, files: list[Texts], device
):
    """Raises an error if MAUVE cannot be computed: for too few texts, or a model that cannot embed them."""
    check_mauve()
    numbers = {} if source is None else {"num_samples": args.num_samples * len(args.seeds)}
    numbers |= {f"{texts.columns['source']}_file": len(texts.texts) for texts in files}
    for name, number in numbers.items():
        if number < 2:
            raise ValueError(f"`{name}`: `mauve_model` compares at least 2 texts of each kind, got {number}.")
    with errors_about("mauve_model", OSError, ValueError):
        embed_texts(["a text"], args.mauve_model, device=device)


def evaluate(args: EvaluationArguments) -> dict[str, Any] | None:
    """
    Generates texts, scores them and reports the scores. Several processes share the generation; the main process does the rest
    and returns the contents of `results.json`.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    output, source, settings, tokenizer = Path(args.output_dir), None, [], None
    with friendly_errors(EvaluationArguments):  # mistakes show before anything is generated or saved
        for name in ("model", "guidance_model", "tokenizer", "scorer", "mauve_model"):
            if getattr(args, name) is not None:
                check_model(name, getattr(args, name))
        if (output / "results.json").exists():
            raise ValueError(f"`output_dir`: {output} has results already; name another directory.")
        check_arguments(args)
        if args.model is not None:
            with errors_about("model", OSError):
                is_flow = is_flow_based(args.model, args.revision)
            if not is_flow:
                check_causal_arguments(args)
        args = complete_arguments(args)
        if args.model is not None:
            if args.protocol == "published":
                config = AutoConfig.from_pretrained(args.model, revision=args.revision)
                length = getattr(config, "max_position_embeddings", None) or 1024
                args = replace(args, length=length, max_length=length)
            with errors_about("model" if args.guidance_model is None else "guidance_model", OSError):
                source = load_source(
                    args.model,
                    revision=args.revision,
                    guidance_model=args.guidance_model,
                    guidance_revision=args.guidance_revision,
                    dtype=args.dtype,
                    attn_implementation=args.attn_implementation,
                    device=state.device,
                    **generate_kwargs(args),
                )
            settings = make_settings(args, source)
            source.warm_up(settings[0])
        if args.tokenizer is not None:
            with errors_about("tokenizer", OSError):
                tokenizer = load_checked(AutoTokenizer, args.tokenizer)
        decoding = {
            "keep_special_tokens": args.keep_special_tokens,
            "clean_up_bert": args.protocol == "published",
        }
        scoring = {
            "scorer": args.scorer,
            "batch_size": args.scorer_batch_size,
            "max_length": args.max_length,
            "dtype": args.scorer_dtype,
            "device": state.device,
            "tokenizer": tokenizer,
            "num_resamples": args.bootstrap,
        }
        if state.is_main_process:
            check_scorer(args)
            with errors_about("scorer", OSError):
                score(["a text"], **scoring)
            from_files = read_files(args, source, tokenizer, decoding)
            with errors_about("tokenizer", ValueError):
                for texts in from_files if tokenizer is not None else []:
                    encode_texts(tokenizer, texts.texts, texts.columns["source"])
            with errors_about("train_file", OSError, ValueError):
                training_texts = None if args.train_file is None else load_lines(args.train_file, args.text_column)
            words = training_texts
            if args.words_file is not None:
                with errors_about("words_file", OSError, ValueError):
                    if is_text_file(args.words_file):
                        words = load_lines(args.words_file)
                    else:  # such as the dictionary of a system, without an ending
                        words = Path(args.words_file).read_text(encoding="utf-8-sig").splitlines()
                if not any(map(split_words, words)):
                    raise ValueError(f"`words_file`: {args.words_file} has no words.")
            check = None if args.check is None else load_check(args.check)
            check_plots()
            if args.update_card:
                with errors_about("update_card", OSError, ValueError):
                    check_results_can_be_added(args.model)
            if args.mauve_model is not None:
                check_mauve_arguments(args, source, from_files, state.device)
        with errors_about("output_dir", OSError):
            output.mkdir(parents=True, exist_ok=True)

    collections = []
    for setting in settings:
        collections.append(generate_texts(source, setting, args.num_samples, args.seeds, args.batch_size, **decoding))
        if state.is_main_process:
            name = "_".join(part for part in ("samples", setting.name) if part)
            collections[-1].save(output / f"{name}.jsonl")
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    throughput = [] if args.batch_sizes is None else measure_settings(source, settings, args.batch_sizes)
    if source is not None:
        source.cpu()

    collections += from_files
    rows, partial = [], output / "partial_results.json"  # for the case that something fails below

    def save_partial_results():
        partial.write_text(to_json({"results": without_texts(rows), "throughput": throughput}, indent=2) + "\n")

    save_partial_results()
    for texts in collections:
        rows.append(score(texts, **scoring))
        save_partial_results()
    text_lists = [texts.texts for texts in collections]
    if check is not None:
        rows = [row | figures for row, figures in zip(rows, check_figures(text_lists, check))]
    vocabulary = None if words is None else vocabulary_of(words)
    repetition = repetition_figures(text_lists, training_texts, vocabulary, args.ngram_sizes, args.bootstrap)
    rows = [row | figures for row, figures in zip(rows, repetition)]
    save_partial_results()
    if args.mauve_model is not None:
        *text_lists, reference = text_lists
        options = {"batch_size": args.scorer_batch_size, "device": state.device}
        mauve = mauve_figures(text_lists, reference, args.mauve_model, **options)
        rows = [row | figures for row, figures in zip(rows, [*mauve, {}])]
    results = report(
        rows, output, args.scorer, describe(args, source), args.seeds, throughput, vars(args), args.bootstrap
    )
    partial.unlink()
    print(f"\n{(output / 'results.md').read_text(encoding='utf-8')}\nTexts, tables and plot: {output}")
    if args.update_card:
        generated = [row for row in results["results"] if row.get("source") != "reference"]
        record = {name: results[name] for name in ("scorer", "num_samples", "seeds", "sampling", "device", "versions")}
        add_results(args.model, {**record, "results": generated}, revision=args.revision)
    return results


def read_files(
    args: EvaluationArguments, source: FlowSource | CausalSource | None, tokenizer, decoding: dict
) -> list[Texts]:
    """Returns the texts of `samples_file` and `reference_file`, as many and as long as the model's."""
    options = {
        "text_column": args.text_column,
        "max_texts": args.num_samples * len(args.seeds),
        "tokenizer": tokenizer if source is None else source.tokenizer,
        "length": args.length if source is None else source.num_tokens,
        **decoding,
    }
    texts = []
    if args.samples_file is not None:
        with errors_about("samples_file", OSError, ValueError):
            texts.append(read_texts(args.samples_file, "samples", **options))
    if args.reference_file is not None:
        wrapped = args.reference_packing == "wrapped"
        with errors_about("reference_file", OSError, ValueError):
            texts.append(read_texts(args.reference_file, "reference", wrapped=wrapped, **options))
    return texts


def measure_settings(
    source: FlowSource | CausalSource, settings: list[Setting], batch_sizes: list[int]
) -> list[dict[str, Any]]:
    """Returns texts and tokens per second of the main process. Temperatures do not change them."""
    rows = []
    for setting in dict.fromkeys(replace(setting, temperature=None) for setting in settings):
        rates = measure_throughput(
            lambda size, setting=setting: sum(s.num_tokens for s in source.sample(setting, range(size), seed=0)),
            tqdm(batch_sizes, desc="Batch sizes"),
        )
        rows += [setting.to_dict() | row for row in rates]
    return rows


def main(arguments: list[str] | None = None):
    evaluate(*make_parser().parse_args_and_config(arguments))


if __name__ == "__main__":
    main()
