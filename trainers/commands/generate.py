# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Texts of a model, from its name on the Hub or its folder.

    flm-generate outputs/quickstart/fmlm --num_samples 8
    flm-generate me/fmlm --num_samples 10000 --num_steps 4 --output samples.jsonl
    flm-generate me/flm --prompts_file prompts.csv --prompt_column question --output answers.parquet
    flm-generate me/flm --num_steps 32 --live
    flm-generate me/fmlm_plus --num_rounds 4 --commit_threshold 0.9 --live
    flm-generate me/flm --prompt "The cat" --guidance_model me/flm --guidance_revision step-1000 --guidance_scale 2
    accelerate launch --num_processes 8 --multi_gpu -m modeling_flm.trainers.commands.generate me/fmlm \
        --num_samples 1000000 --output samples.jsonl

Without --output the texts go to stdout, one after the other. A .jsonl or .parquet file gets a row for each text, with
`index`, `text`, `tokens`, `num_steps` (its forward passes), `seed`, and `prompt` if there is one. A text depends on its index and
the seed alone, however many processes there are. Each of several writes a file of its own, samples-00000.jsonl and so on.
Lines are whole after every batch (a .parquet file is one of lines until it is finished), and --resume goes on with what an
interrupted command has written, with any number of processes, and where there are no prompts also with more texts.
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
from modeling_flm.pipeline_flm import encode_prompts  # which registers the models with the auto classes, too

from ..data import find_text_column, load_texts
from ..evaluation import generate_samples
from ..evaluation.sources import SAMPLERS
from .command_line import check_device, check_kind, check_model, explained, terminated_as_interrupted
from .shards import TextShards


# Where prompts come from, and what does not change texts.
_PROMPT_SOURCES = ("prompt", "prompts_file", "prompts_dataset")
_NO_SETTINGS = {"output", "resume", "batch_size", "device", "live", "prompt_column", "prompts_config", "prompts_split"}
_NO_SETTINGS |= {"num_samples", *_PROMPT_SOURCES}


def _budget(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help="the name of a model of the Hub, or its folder"
    )
    parser.add_argument("--model", help="the same, as for the other commands")
    parser.add_argument("--revision", default="main", help="the branch, tag or commit of the model to take")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts; with prompts, of each")
    parser.add_argument("--num_steps", type=int, help="forward passes for each text (default: as the model says)")
    parser.add_argument("--length", type=int, help="tokens of each text (default: as the model says)")
    parser.add_argument("--batch_size", type=int, default=64, help="texts at a time, which does not change them")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="flow_map follows the flow (default), bridge draws tokens at every step"
    )
    parser.add_argument("--temperature", type=float, help="divides the logits, such as 0.9 (default: 1)")
    parser.add_argument("--top_k", type=int, help="only the so many likeliest tokens (default: all)")
    parser.add_argument(
        "--top_p", type=float, help="only the likeliest tokens that make up this probability (default: 1)"
    )
    parser.add_argument("--prompt", help="how every text begins")
    parser.add_argument(
        "--prompts_file", help="a txt file with a prompt on each line, or a json, jsonl, csv or parquet file"
    )
    parser.add_argument("--prompts_dataset", help="the name of a dataset of the Hub with prompts, or its folder")
    parser.add_argument("--prompts_config", help="the configuration of that dataset")
    parser.add_argument("--prompts_split", default="train", help="its split, or a part of it such as test[:100]")
    parser.add_argument("--prompt_column", help="the column with the prompts")
    parser.add_argument("--gamma", type=float, help="share of the noise that is drawn anew at every step, 0 to 1")
    parser.add_argument(
        "--num_rounds", type=int, help="posterior refinement: write so often, and keep the likeliest tokens"
    )
    parser.add_argument(
        "--commit_threshold", type=float, help="keep tokens of at least this probability after a round"
    )
    parser.add_argument("--commit_budget", type=_budget, help="how many to keep in any case: a number, or uniform")
    parser.add_argument("--block_length", type=int, help="write from left to right, so many tokens at a time")
    parser.add_argument(
        "--keep_noise",
        action="store_false",
        dest="fresh_noise",
        default=None,
        help="write again from the noise of before",
    )
    parser.add_argument("--guidance_model", help="a worse model to move away from: an earlier or a smaller one")
    parser.add_argument("--guidance_revision", default="main", help="its branch, tag or commit")
    parser.add_argument("--guidance_scale", type=float, help="how far to move away from it, such as 2")
    parser.add_argument(
        "--pad_after_eos", action="store_true", default=None, help="end texts at their first end token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise; another one gives other texts (default: 0)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="precision (default: that of the weights)",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: an accelerator if there is one)")
    parser.add_argument("--attn_implementation", help="such as sdpa or flash_attention_2")
    parser.add_argument("--keep_special_tokens", action="store_true", help="show where texts begin and end")
    parser.add_argument("--live", action="store_true", help="show a single text forming, in the terminal")
    parser.add_argument("--output", type=Path, help="a .jsonl or .parquet file to write instead of stdout")
    parser.add_argument("--resume", action="store_true", help="go on with what is there of --output")
    return parser


def check_arguments(args: argparse.Namespace):
    """Ends the script for arguments that cannot be used."""
    parser = make_parser()
    if args.model is None:
        parser.error("name a MODEL, of the Hub or a folder")
    if args.output is not None and args.output.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--output: {args.output} must end in .jsonl or .parquet")
    if args.resume and args.output is None:
        parser.error("--resume goes on with a file: name it by --output")
    if sum(getattr(args, name) is not None for name in _PROMPT_SOURCES) > 1:
        parser.error("--prompt, --prompts_file and --prompts_dataset do not go together: pass one of them")
    if args.sampler == "bridge" and args.gamma is not None:
        parser.error("--gamma is about --sampler flow_map: leave it out")
    if args.live and args.num_samples != 1:
        parser.error("--live shows one text: leave --num_samples at 1")
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")


def load_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts that the arguments name."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts_file is None and args.prompts_dataset is None:
        return None
    try:
        source = {"train_file": args.prompts_file}
        if args.prompts_dataset is not None:
            source = {"dataset_name": args.prompts_dataset, "dataset_config_name": args.prompts_config}
            source["train_split"] = args.prompts_split
        dataset = load_texts(**source, validation_percentage=0)["train"]
        prompts = list(dataset[find_text_column(dataset, args.prompt_column)])
    except (OSError, ValueError) as error:
        names = {"`train_file`": "`prompts_file`", "`text_column`": "`prompt_column`"}
        message = str(error)
        for name, ours in names.items():
            message = message.replace(name, ours)
        raise ValueError(message) from error
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("`prompt_column`: not all of its values are texts; name another.")
    if not prompts:
        raise ValueError(f"`{'prompts_file' if args.prompts_dataset is None else 'prompts_dataset'}` has no prompts.")
    return prompts


def check_lengths(prompts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int | None):
    """Raises a `ValueError` for a prompt that is longer than texts are, of which the last may be written hours later."""
    longest = length or model.generation_config.length or model.config.max_position_embeddings
    num_begin = 0 if model.generation_config.bos_token_id is None else 1
    token_lists = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
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
    """The texts with the numbers of each batch, each as a row. All texts of the first prompt come first."""
    names = ("num_steps", "length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos")
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
                row["prompt"] = prompts[row["index"] // args.num_samples]
            begin = model.generation_config.bos_token_id
            known = encode_prompts(tokenizer, [row["prompt"] for row in rows], begin)
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
            row |= {"text": text, "tokens": tokens, "num_steps": num_passes, "seed": args.seed}
        yield rows


def deal_out(missing: Sequence[int], batch_size: int, process_index: int, num_processes: int) -> list[Sequence[int]]:
    """The batches of a process. All have equally many texts, and few texts are not left to the first process."""
    size = max(1, min(batch_size, -(-len(missing) // num_processes)))
    starts = range(0, len(missing), size)[process_index::num_processes]
    return [missing[start : start + size] for start in starts]


def get_settings(args: argparse.Namespace, model: PreTrainedModel, prompts: list[str] | None) -> dict:
    """What texts depend on, to tell whether a file can be gone on with."""
    settings = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS and value is not None}
    if (commit := getattr(model.config, "_commit_hash", None)) is not None:
        settings["commit"] = commit
    if prompts is not None:  # the number of a text depends on how many there are of each
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        settings |= {"num_samples": args.num_samples, "prompts_sha256": digest}
    return settings


def write_texts(args: argparse.Namespace):
    check_arguments(args)
    check_model("MODEL", args.model)
    check_device("--device", args.device)
    # Where one process has finished, the others may still take long.
    on_cpu = torch.device(args.device or "cuda").type == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    if state.num_processes > 1 and args.live:
        raise ValueError("`live` is for one process: leave it out.")
    if state.num_processes > 1 and args.device is not None and torch.device(args.device).index is not None:
        raise ValueError("`device`: each of several processes has its own; leave it out.")

    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    device = state.device if state.num_processes > 1 else args.device
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModel.from_pretrained(args.model, dtype=args.dtype, revision=args.revision, **options)
    check_kind("MODEL", model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    model = model.to(device).eval()
    guidance_model = None
    if args.guidance_model is not None:
        guidance_model = AutoModel.from_pretrained(
            args.guidance_model, dtype=args.dtype, revision=args.guidance_revision, **options
        )
        guidance_model = guidance_model.to(device).eval()
    with state.local_main_process_first():  # which fills the caches of datasets
        prompts = load_prompts(args)
    if prompts is not None:
        check_lengths(prompts, tokenizer, model, args.length)

    num_texts = args.num_samples * (1 if prompts is None else len(prompts))
    settings = get_settings(args, model, prompts)
    shards, done = None, set()
    if args.output is not None:
        shards = TextShards(args.output, state.process_index, state.num_processes)
        done = find_done(shards, settings, args.resume, state)
    missing = [index for index in range(num_texts) if index not in done] if done else range(num_texts)
    batches = deal_out(missing, args.batch_size, state.process_index, state.num_processes)
    num_mine = sum(map(len, batches))
    if done and state.is_main_process:
        print(f"{num_texts - len(missing)} of {num_texts} texts are there already.", file=sys.stderr)

    shows_progress = state.is_main_process and not args.live
    is_terminal = sys.stderr.isatty()
    rows = generate(model, tokenizer, args, batches, prompts, guidance_model)
    progress = tqdm(
        total=num_mine,
        desc="Generating" if state.num_processes == 1 else f"Generating, in each of {state.num_processes} processes",
        unit="text",
        disable=not shows_progress,
        mininterval=0.1 if is_terminal else 30,  # for the log of a job
    )
    num_written = 0
    try:
        with terminated_as_interrupted(), steps_shown(shows_progress and is_terminal), progress:
            if shards is None and state.num_processes > 1:
                everything = gather_object(list(chain.from_iterable(rows)))
                print_rows(sorted(everything, key=lambda row: row["index"]), args, state)
            else:
                for batch in rows:
                    if shards is None:
                        print_rows(batch, args, state)
                    else:
                        shards.append(batch, settings)
                    num_written += len(batch)
                    progress.update(len(batch))
            if shards is not None:
                shards.finish()
    except KeyboardInterrupt:
        if state.is_local_main_process:
            print(describe_interruption(shards, num_written, num_mine, len(done), state), file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    state.wait_for_everyone()
    if shards is not None and state.is_local_main_process:
        shards.finish_others()
        files = shards.files()
        print(f"{num_texts} texts: {files[0] if len(files) == 1 else f'{files[0]} to {files[-1].name}'}")
    state.destroy_process_group()


@contextmanager
def steps_shown(is_shown: bool) -> Iterator[None]:
    """Within this context `generate()` shows the steps of a batch, or not."""
    was_shown = logging.is_progress_bar_enabled()
    if not is_shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def find_done(shards: TextShards, settings: dict, resume: bool, state: PartialState) -> set[int]:
    """The numbers of the texts that are there already, on any machine. All processes raise the same errors."""
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
    if state.is_main_process and not args.live:  # the streamer has shown it
        for row in rows:
            tqdm.write(row["text"], file=sys.stdout)
        sys.stdout.flush()


def describe_interruption(
    shards: TextShards | None, num_written: int, num_mine: int, num_before: int, state: PartialState
) -> str:
    """What is there after an interruption, and how to go on."""
    if shards is None:
        return f"Interrupted after {num_written} of {num_mine} texts."
    if num_written + num_before == 0 and state.num_processes == 1:
        return "Interrupted: nothing is written."
    pattern = shards.pattern.with_suffix(".jsonl")
    whose = "" if state.num_processes == 1 else f", in process {state.process_index} of {state.num_processes}"
    before = f", beside the {num_before} of before" if num_before else ""
    return (
        f"Interrupted: {num_written} of {num_mine} texts are written{whose}{before}, to {pattern}. "
        "The same command with --resume goes on."
    )


def main(arguments: list[str] | None = None):
    args = make_parser().parse_args(arguments)
    try:
        with explained(flags=vars(args).keys() - {"model"}):
            write_texts(args)
    except KeyboardInterrupt:  # while the model was loaded
        print("Interrupted: nothing is written.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
