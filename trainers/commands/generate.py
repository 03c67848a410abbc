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
"""
Texts of a model, from its name on the Hub or its folder.

    flm-generate outputs/quickstart/fmlm --num_samples 8
    flm-generate me/fmlm --num_samples 10000 --num_steps 4 --output samples.jsonl
    flm-generate me/flm --num_steps 32 --live
    flm-generate me/fmlm_plus --num_rounds 4 --commit_threshold 0.9 --live
    flm-generate me/flm --prompt "The cat" --guidance_model me/flm --guidance_revision step-1000 --guidance_scale 2

Without --output the texts go to stdout, one after the other. A .jsonl or .parquet file gets a row for each text, with
`text`, `tokens`, `num_steps` (its forward passes) and `seed`; a .jsonl file has all that was generated so far if the script is interrupted.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextDiffusionStreamer

from modeling_flm.pipeline_flm import encode_prompts  # which registers the models with the auto classes, too


def _budget(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the name of a model of the Hub, or its folder")
    parser.add_argument("--revision", default="main", help="the branch, tag or commit of the model to take")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--num_steps", type=int, help="forward passes for each text (default: as the model says)")
    parser.add_argument("--length", type=int, help="tokens of each text (default: as the model says)")
    parser.add_argument("--batch_size", type=int, default=64, help="texts at a time, which does not change them")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--prompt", help="how every text begins")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="such as cuda or cpu (default: an accelerator if there is one)")
    parser.add_argument("--attn_implementation", help="such as sdpa or flash_attention_2")
    parser.add_argument("--keep_special_tokens", action="store_true", help="show where texts begin and end")
    parser.add_argument("--live", action="store_true", help="show a single text forming, in the terminal")
    parser.add_argument("--output", type=Path, help="a .jsonl or .parquet file to write instead of stdout")
    return parser


def check_arguments(args: argparse.Namespace):
    """Ends the script for arguments that cannot be used."""
    parser = make_parser()
    if args.output is not None and args.output.suffix not in (".jsonl", ".parquet"):
        parser.error(f"--output: {args.output} must end in .jsonl or .parquet")
    if args.output is not None and args.output.exists():
        parser.error(f"--output: {args.output} exists already; name another file")
    if args.live and args.num_samples != 1:
        parser.error("--live shows one text: leave --num_samples at 1")
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    guidance_model: PreTrainedModel | None = None,
) -> Iterator[dict[str, str | int | list[int]]]:
    """The texts, each as a row, a batch at a time."""
    names = ("num_steps", "length", "temperature", "top_k", "top_p", "gamma", "guidance_scale", "pad_after_eos")
    names += ("num_rounds", "commit_threshold", "commit_budget", "block_length", "fresh_noise")
    parameters = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.prompt is not None:
        parameters |= encode_prompts(tokenizer, [args.prompt], model.generation_config.bos_token_id)
    generator = torch.Generator().manual_seed(args.seed)
    streamer = TextDiffusionStreamer(tokenizer) if args.live else None
    for start in range(0, args.num_samples, args.batch_size):
        size = min(args.batch_size, args.num_samples - start)
        output = model.generate(
            num_samples=size,
            batch_size=size,
            generator=generator,
            streamer=streamer,
            guidance_model=guidance_model,
            return_dict_in_generate=True,
            **parameters,
        )
        texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=not args.keep_special_tokens)
        for text, tokens, num_passes in zip(texts, output.sequences.tolist(), output.num_forward_passes.tolist()):
            yield {"text": text, "tokens": tokens, "num_steps": num_passes, "seed": args.seed}


def write_texts(args: argparse.Namespace):
    check_arguments(args)
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    model = AutoModel.from_pretrained(args.model, dtype=args.dtype, revision=args.revision, **options)
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = model.to(device).eval()
    guidance_model = None
    if args.guidance_model is not None:
        guidance_model = AutoModel.from_pretrained(
            args.guidance_model, dtype=args.dtype, revision=args.guidance_revision, **options
        )
        guidance_model = guidance_model.to(device).eval()

    rows = generate(model, tokenizer, args, guidance_model)
    rows = chain([next(rows)], rows)  # what is wrong with the arguments shows before there is a file
    rows = tqdm(rows, total=args.num_samples, unit="text", disable=args.live or not sys.stderr.isatty())
    if args.output is None:
        for row in rows:
            if not args.live:  # the streamer has shown it
                print(row["text"], flush=True)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(args.output)
    else:
        with args.output.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    print(f"{args.num_samples} texts: {args.output}")


def main(arguments: list[str] | None = None):
    try:
        write_texts(make_parser().parse_args(arguments))
    except (OSError, ValueError) as error:  # of names that do not exist, and parameters that cannot be used
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
