# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Generate texts with a model, from its name on the Hub or its folder.

    flm-generate outputs/quickstart/fmlm --num_samples 8
    flm-generate me/fmlm --num_samples 10000 --num_steps 4 --output samples.jsonl
    flm-generate me/flm --prompts_file prompts.csv --prompt_column question --num_return_sequences 4 --output answers.jsonl
    flm-generate me/flm --num_steps 32 --live
    flm-generate me/fmlm_plus --num_rounds 4 --commit_threshold 0.9 --live
    flm-generate me/flm --prompt "The cat" --guidance_model me/flm --guidance_revision step-1000 --guidance_scale 2
    accelerate launch --num_processes 8 --multi_gpu -m modeling_flm.trainers.commands.generate me/fmlm \
        --num_samples 1000000 --output samples.jsonl

Without --output the texts are printed. With it they are written as JSON lines: a row per text with `index`, `text`, `tokens`,
`num_forward_passes`, `seed`, and `prompt` if there is one. A text depends only on its index and the seed, not on the batch size
or the number of processes. Each of several processes writes its own file: samples-00000.jsonl and so on. The files are valid
after every batch. --resume continues an interrupted command, with any number of processes; without prompts also with a larger
--num_samples.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextDiffusionStreamer
from transformers.utils import logging

from modeling_flm import BridgeSamplerConfig
from modeling_flm.pipeline_flm import encode_prompts, encode_texts, warn_of_unknown_words

from ..data import find_text_column, load_texts
from ..evaluation import generate_samples
from ..evaluation.sources import SAMPLERS
from .command_line import check_device, check_model_type, friendly_errors, terminated_as_interrupted
from .shards import TextShards
from .training import load_pretrained


# Flags that name prompts, and flags that do not change texts
_PROMPT_SOURCES = ("prompt", "prompts_file", "prompts_dataset")
_NO_SETTINGS = {"output", "resume", "batch_size", "device", "live", "prompt_column", "prompts_config", "prompts_split"}
_NO_SETTINGS |= {"num_samples", "num_return_sequences", *_PROMPT_SOURCES}


def _int_or_text(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default=argparse.SUPPRESS, help="name of a model on the Hub, or its folder")
    add("--model", help="the same, as for the other commands")
    add("--revision", default="main", help="branch, tag or commit of the model")
    add("--num_samples", type=int, help="number of texts, without prompts (default: 1)")
    add("--num_return_sequences", type=int, help="number of texts for each prompt (default: 1)")
    add("--num_steps", type=int, help="number of sampling steps (default: the model's)")
    add("--length", type=int, help="tokens per text (default: the model's)")
    add("--batch_size", type=int, default=64, help="texts generated at a time; does not change them")
    add(
        "--sampler",
        choices=SAMPLERS,
        help="flow_map follows the flow (default), bridge draws tokens at every step",
    )
    add("--temperature", type=float, help="divides the logits, such as 0.9 (default: 1)")
    add("--top_k", type=int, help="sample only from the k most likely tokens (default: all)")
    add("--top_p", type=float, help="sample only from the most likely tokens with this total probability (default: 1)")
    add("--gamma", type=float, help="share of fresh noise at every step, from 0 to 1")
    add("--num_fixed_point_iterations", type=int, help="forward passes at every step, for self-conditioning")
    add("--stability_threshold", type=int, help="end a text whose tokens stay the same for this number of steps")
    add("--confidence_threshold", type=float, help="end a text whose mean entropy per token is below this, in nats")
    add("--prompt", help="start of every text")
    add(
        "--prompts_file",
        help="a txt file with one prompt per line, a json, jsonl, csv, tsv or parquet file, or a folder",
    )
    add("--prompts_dataset", help="name of a dataset of prompts on the Hub, or a folder with one")
    add("--prompts_config", help="configuration of the dataset")
    add("--prompts_split", default="train", help="split of the dataset, or a part of it such as test[:100]")
    add("--prompt_column", help="column with the prompts")
    add("--num_rounds", type=int, help="number of refinement rounds; each keeps the most confident tokens")
    add("--commit_threshold", type=float, help="keep tokens of at least this probability after a round")
    add("--commit_budget", type=_int_or_text, help="minimum number of tokens to keep after a round, or uniform")
    add("--block_length", type=int, help="generate left to right, in blocks of this many tokens")
    add(
        "--keep_noise",
        action="store_false",
        dest="fresh_noise",
        default=None,
        help="reuse the same noise in every round",
    )
    add("--guidance_model", help="a weaker model to move away from, such as an earlier checkpoint or a smaller model")
    add("--guidance_revision", default="main", help="branch, tag or commit of the weaker model")
    add("--guidance_scale", type=float, help="strength of the guidance, such as 2")
    add("--pad_after_eos", action="store_true", default=None, help="end texts at their first EOS token")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add(
        "--dtype",
        default="auto",
        help="precision (default: as saved)",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    add("--device", help="such as cuda or cpu (default: an accelerator, if available)")
    add("--attn_implementation", help="such as sdpa or flash_attention_2")
    add("--keep_special_tokens", action="store_true", help="show special tokens such as BOS and EOS")
    add("--live", action="store_true", help="show a single text as it forms, in the terminal")
    add("--output", type=Path, help="a .jsonl file to write instead of printing")
    add("--resume", action="store_true", help="continue an existing --output file")
    return parser


def check_arguments(args: argparse.Namespace):
    """Ends the command for arguments that exclude each other, and fills in numbers of texts."""
    parser = make_parser()
    if args.model is None:
        parser.error("name a MODEL, of the Hub or a folder")
    if args.output is not None and args.output.suffix != ".jsonl":
        parser.error(f"--output: {args.output} must end in .jsonl")
    if args.resume and args.output is None:
        parser.error("--resume continues a file: name it by --output")
    num_sources = sum(getattr(args, name) is not None for name in _PROMPT_SOURCES)
    if num_sources > 1:
        parser.error("--prompt, --prompts_file and --prompts_dataset exclude each other: pass one of them")
    if num_sources > 0 and args.num_samples is not None:
        parser.error(
            "--num_samples is for texts without prompts: pass --num_return_sequences, the number for each prompt"
        )
    if num_sources == 0 and args.num_return_sequences is not None:
        parser.error("--num_return_sequences is for prompts: pass --num_samples, the number of texts")
    args.num_samples, args.num_return_sequences = (
        1 if number is None else number for number in (args.num_samples, args.num_return_sequences)
    )
    for name in ("num_samples", "num_return_sequences", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if args.sampler == "bridge" and args.gamma is not None:
        parser.error("--gamma is a setting of --sampler flow_map: leave it out")
    if args.guidance_revision != "main" and args.guidance_model is None:
        parser.error("--guidance_revision needs --guidance_model: pass the name of a weaker model")
    if args.live and (args.num_samples, args.num_return_sequences) != (1, 1):
        parser.error("--live shows one text: leave out --num_samples and --num_return_sequences")


def load_prompts(args: argparse.Namespace) -> list[str] | None:
    """Loads the prompts that the arguments name, if any."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts_file is None and args.prompts_dataset is None:
        return None
    try:
        source = {"train_file": args.prompts_file}
        if args.prompts_dataset is not None:
            source = {"dataset_name": args.prompts_dataset, "dataset_config_name": args.prompts_config}
            source["train_split"] = args.prompts_split
        dataset = load_texts(**source, validation_percentage=0, text_column=args.prompt_column)["train"]
        prompts = list(dataset[find_text_column(dataset, args.prompt_column)])
    except (OSError, ValueError) as error:
        message = str(error)
        flags = {"train_file": "prompts_file", "text_column": "prompt_column", "dataset_name": "prompts_dataset"}
        for name, flag in {**flags, "train_split": "prompts_split"}.items():
            message = message.replace(f"`{name}`", f"`{flag}`")
        raise ValueError(message) from error
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            "`prompt_column`: not all of its values are strings; remove these rows, or pass another column."
        )
    if not prompts:
        raise ValueError(f"`{'prompts_file' if args.prompts_dataset is None else 'prompts_dataset'}` has no prompts.")
    return prompts


def check_prompts(
    args: argparse.Namespace, prompts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
):
    """Raises a `ValueError` for a prompt that cannot be used, or is longer than the texts, before the first is generated."""
    argument = next(name for name in _PROMPT_SOURCES if getattr(args, name) is not None)
    longest = args.length or model.generation_config.length or model.config.max_position_embeddings
    num_begin = 0 if model.generation_config.bos_token_id is None else 1
    token_lists = encode_texts(tokenizer, prompts, argument)
    warn_of_unknown_words(tokenizer, prompts, token_lists)
    for number, tokens in enumerate(token_lists, 1):
        if num_begin + len(tokens) > longest:
            raise ValueError(
                f"Prompt {number} has {num_begin + len(tokens)} tokens, but texts have {longest} (`length`): "
                f"{prompts[number - 1][:40]!r}"
            )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    batches: Iterable[Sequence[int]],
    prompts: list[str] | None = None,
    guidance_model: PreTrainedModel | None = None,
) -> Iterator[list[dict[str, str | int | list[int]]]]:
    """Generates the texts with the indices of each batch, as rows. The texts of the first prompt have the first indices."""
    names = ("num_steps", "length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos")
    names += ("num_fixed_point_iterations", "stability_threshold", "confidence_threshold")
    names += ("num_rounds", "commit_threshold", "commit_budget", "block_length", "fresh_noise")
    parameters = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.sampler == "bridge":
        parameters["sampler_config"] = BridgeSamplerConfig()
    if args.live:
        parameters["streamer"] = TextDiffusionStreamer(tokenizer)
    for indices in batches:
        rows = [{"index": index} for index in indices]
        known = {}
        if prompts is not None:
            for row in rows:
                row["prompt"] = prompts[row["index"] // args.num_return_sequences]
            begin = model.generation_config.bos_token_id
            known = encode_prompts(tokenizer, [row["prompt"] for row in rows], begin, warn=False)
        output = generate_samples(
            model,
            list(indices),
            args.seed,
            batch_size=len(indices),
            guidance_model=guidance_model,
            return_dict_in_generate=True,
            **known,
            **parameters,
        )
        texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=not args.keep_special_tokens)
        columns = (rows, texts, output.sequences.tolist(), output.num_forward_passes.tolist())
        for row, text, tokens, num_passes in zip(*columns):
            row |= {"text": text, "tokens": tokens, "num_forward_passes": num_passes, "seed": args.seed}
        yield rows


def split_batches_between_processes(
    missing: Sequence[int], batch_size: int, process_index: int, num_processes: int
) -> list[Sequence[int]]:
    """The batches of a process. Batches are equally large, so that a small remainder is spread over all processes."""
    size = max(1, min(batch_size, -(-len(missing) // num_processes)))
    starts = range(0, len(missing), size)[process_index::num_processes]
    return [missing[start : start + size] for start in starts]


def get_settings(args: argparse.Namespace, model: PreTrainedModel, prompts: list[str] | None) -> dict:
    """The settings that texts depend on. An existing file can be resumed if its settings are the same."""
    settings = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS and value is not None}
    if (commit := getattr(model.config, "_commit_hash", None)) is not None:
        settings["commit"] = commit
    if prompts is not None:  # the prompt of an index depends on the number of texts per prompt
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        settings |= {"num_return_sequences": args.num_return_sequences, "prompts_sha256": digest}
    return settings


def start_processes(args: argparse.Namespace) -> PartialState:
    """Distributed state of this process under `accelerate launch`."""
    check_device("device", args.device)
    on_cpu = torch.device(args.device or "cuda").type == "cpu" or not torch.accelerator.is_available()
    # Processes finish at different times, so they must wait for each other without a timeout.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    if state.num_processes > 1 and args.live:
        raise ValueError("`live` needs a single process: leave it out.")
    if state.num_processes > 1 and args.device is not None and torch.device(args.device).index is not None:
        raise ValueError("`device`: each process has a device of its own; leave out the index.")
    return state


def load_models(
    args: argparse.Namespace, state: PartialState
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | None]:
    """Loads the model, its tokenizer and the guidance model, if any, on the device of this process."""
    device = state.device if state.num_processes > 1 else args.device
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"

    def load(argument: str, revision: str) -> PreTrainedModel:
        options = {"dtype": args.dtype, "attn_implementation": args.attn_implementation, "revision": revision}
        return load_pretrained(argument, AutoModel, getattr(args, argument), **options).to(device).eval()

    model = load("model", args.revision)
    check_model_type("model", model)
    tokenizer = load_pretrained("model", AutoTokenizer, args.model, revision=args.revision)
    guidance_model = None if args.guidance_model is None else load("guidance_model", args.guidance_revision)
    return model, tokenizer, guidance_model


def write_texts(args: argparse.Namespace):
    """Generates the share of this process of all texts, and writes or prints them."""
    check_arguments(args)
    state = start_processes(args)
    model, tokenizer, guidance_model = load_models(args, state)
    with state.local_main_process_first():  # it fills the caches of datasets
        prompts = load_prompts(args)
    if prompts is not None:
        check_prompts(args, prompts, tokenizer, model)
    num_texts = args.num_samples if prompts is None else args.num_return_sequences * len(prompts)

    settings = get_settings(args, model, prompts)
    shards, done = None, set()
    if args.output is not None:
        shards = TextShards(args.output, state.process_index, state.num_processes)
        done = find_done(shards, settings, args.resume, state)
    missing = [index for index in range(num_texts) if index not in done] if done else range(num_texts)
    if done and state.is_main_process:
        print(f"{num_texts - len(missing)} of {num_texts} texts exist already.", file=sys.stderr)

    batches = split_batches_between_processes(missing, args.batch_size, state.process_index, state.num_processes)
    rows = generate(model, tokenizer, args, batches, prompts, guidance_model)
    num_mine, num_written = sum(map(len, batches)), 0
    try:
        with terminated_as_interrupted(), show_progress(num_mine, state, args) as progress:
            if shards is None and state.num_processes > 1:
                everything = gather_object(list(chain.from_iterable(rows)))
                rows = [sorted(everything, key=lambda row: row["index"])]
            for batch in rows:
                if shards is None:
                    print_rows(batch, args, state)
                else:
                    shards.append(batch, settings)
                num_written += len(batch)
                progress.update(len(batch))
    except KeyboardInterrupt:
        if state.is_local_main_process:
            print(describe_interruption(shards, num_written, num_mine, len(done), state), file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    state.wait_for_everyone()
    if shards is not None and state.is_local_main_process:
        files = shards.files()
        print(f"{num_texts} texts: {files[0] if len(files) == 1 else f'{files[0]} to {files[-1].name}'}")
    state.destroy_process_group()


@contextmanager
def show_progress(num_texts: int, state: PartialState, args: argparse.Namespace) -> Iterator[tqdm]:
    """A progress bar of texts. In a terminal, `generate()` shows the steps of a batch as well."""
    is_shown, is_terminal = state.is_main_process and not args.live, sys.stderr.isatty()
    in_processes = f", in each of {state.num_processes} processes" if state.num_processes > 1 else ""
    was_enabled = logging.is_progress_bar_enabled()
    if not (is_shown and is_terminal):
        logging.disable_progress_bar()
    try:
        with tqdm(
            total=num_texts,
            desc=f"Generating{in_processes}",
            unit="text",
            disable=not is_shown,
            mininterval=0.1 if is_terminal else 30,  # the log of a job
        ) as progress:
            yield progress
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def find_done(shards: TextShards, settings: dict, resume: bool, state: PartialState) -> set[int]:
    """The indices of the texts that exist on any machine. All processes raise the same errors."""
    found, problem = set(), None
    if state.is_local_main_process:
        try:
            found = shards.start(settings, resume)
        except (OSError, ValueError) as error:
            problem = str(error)
    answers = gather_object([(found, problem)])
    if problems := [problem for _, problem in answers if problem is not None]:
        raise ValueError(problems[0])
    return set().union(*(indices for indices, _ in answers))


def print_rows(rows: list[dict], args: argparse.Namespace, state: PartialState):
    if state.is_main_process and not args.live:  # the streamer has already shown it
        for row in rows:
            tqdm.write(row["text"], file=sys.stdout)
        sys.stdout.flush()


def describe_interruption(
    shards: TextShards | None, num_written: int, num_mine: int, num_before: int, state: PartialState
) -> str:
    """A message about the written texts, and how to continue."""
    if shards is None:
        return f"Interrupted after {num_written} of {num_mine} texts."
    if num_written + num_before == 0 and state.num_processes == 1:
        return "Interrupted: nothing is written."
    whose = "" if state.num_processes == 1 else f", in process {state.process_index} of {state.num_processes}"
    before = f", in addition to {num_before} earlier ones" if num_before else ""
    return (
        f"Interrupted: {num_written} of {num_mine} texts are written{whose}{before}, to {shards.pattern}. "
        "Repeat the command with --resume to continue."
    )


def main(arguments: list[str] | None = None):
    args = make_parser().parse_args(arguments)
    try:
        with friendly_errors(flags=vars(args)):
            write_texts(args)
    except KeyboardInterrupt:  # while the model is loaded
        print("Interrupted: nothing is written.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
