# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Evaluate the four models that the paper's authors released, and print the results beside the published figures.

    python examples/published.py                                # 1024 samples at every published number of steps, on a GPU
    python examples/published.py --quick                        # 32 samples, at most 32 steps
    python examples/published.py --models fmlm_lm1b --quick

Each model is downloaded, converted to outputs/NAME, and evaluated with its recipe in `examples/recipes`, to outputs/evaluation_NAME.
Finished parts are not repeated. With several GPUs, run the recipes with `accelerate launch` first: they write to the same folders.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from transformers import AutoConfig
from transformers.utils import logging

from modeling_flm.hub.convert import main as convert
from modeling_flm.trainers.commands.evaluate import main as evaluate


EXAMPLES = Path(__file__).parent

# Generative perplexity under GPT-2 large and entropy in nats, by the number of steps: arXiv 2602.16813 and its repository
PUBLISHED = {
    "flm_lm1b": {
        8: (243.36, 2.41),
        16: (198.53, 4.22),
        32: (152.01, 4.40),
        64: (126.51, 4.36),
        128: (112.54, 4.34),
        256: (104.59, 4.32),
        512: (99.75, 4.30),
        1024: (96.91, 4.29),
    },
    "fmlm_lm1b": {
        1: (119.34, 4.16),
        2: (110.19, 4.21),
        4: (98.76, 4.21),
        8: (86.32, 4.21),
        16: (78.35, 4.21),
        32: (69.21, 4.21),
    },
    "flm_owt": {
        8: (449.15, 5.21),
        16: (380.99, 5.66),
        32: (240.11, 5.72),
        64: (147.28, 5.68),
        128: (103.30, 5.58),
        256: (82.05, 5.48),
        512: (70.22, 5.40),
        1024: (62.23, 5.33),
    },
    "fmlm_owt": {
        1: (168.30, 5.17),
        2: (133.29, 5.25),
        4: (111.31, 5.26),
        8: (86.50, 5.36),
        16: (63.63, 5.29),
        32: (45.09, 5.25),
    },
}
QUICK_SAMPLES = QUICK_STEPS = 32  # of --quick


def repository(name: str, owner: str) -> str:
    """Returns the name on the Hub: `flm_lm1b` is `FLM-B-LM1B`."""
    model, data = name.upper().split("_")
    return f"{owner}/{model}-B-{data}"


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of a model, and converts and evaluates it first if needed."""
    folder = args.output_dir / name
    results = args.output_dir / f"evaluation_{name}{'_quick' if args.quick else ''}"
    if not folder.is_dir():
        print(f"{name}: converting {repository(name, args.owner)}", flush=True)
        convert(["--checkpoint", repository(name, args.owner), "--output", str(folder)])
    if not (folder / "tokenizer_config.json").is_file():
        raise SystemExit(
            f"error: {folder} has no tokenizer. Delete the folder, and run `flm-convert --checkpoint "
            f"{repository(name, args.owner)} --tokenizer NAME --output {folder}` with the tokenizer's name."
        )
    if not (results / "results.json").is_file():
        arguments = [EXAMPLES / "recipes" / f"evaluation_{name}.yaml", "--model", folder, "--output_dir", results]
        arguments += ["--scorer", args.scorer]
        if args.quick:
            steps = [num_steps for num_steps in PUBLISHED[name] if num_steps <= QUICK_STEPS]
            arguments += ["--num_samples", QUICK_SAMPLES, "--num_steps", *steps]
        evaluate([str(argument) for argument in arguments])
    return json.loads((results / "results.json").read_text(encoding="utf-8"))


def compare(name: str, evaluation: dict[str, Any]) -> str:
    """Returns a Markdown table of our results beside the published figures."""
    sampling, size = evaluation["sampling"], evaluation["num_samples"]
    lines = [
        f"### {name}, gamma {sampling.get('gamma', 0.0)}, {size} samples under {evaluation['scorer']}",
        "",
        "| steps | gen. ppl, published | ours (95 %) | deviation | entropy, published | ours | deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in evaluation["results"]:
        if row["num_steps"] not in PUBLISHED[name] or row["gen_ppl"] is None:  # empty texts have no perplexity
            continue
        perplexity, entropy = PUBLISHED[name][row["num_steps"]]
        low, high = row["gen_ppl_interval"]
        cells = [
            *(row["num_steps"], perplexity, f"{row['gen_ppl']:.2f} ({low:.2f} - {high:.2f})"),
            f"{row['gen_ppl'] / perplexity - 1:+.1%}",
            *(entropy, f"{row['entropy']:.2f}", f"{row['entropy'] - entropy:+.2f}"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(PUBLISHED),
        default=list(PUBLISHED),
        help="models to evaluate (default: all four)",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples at up to {QUICK_STEPS} steps")
    parser.add_argument("--owner", default="david3684", help="owner of the repositories on the Hub")
    parser.add_argument("--scorer", default="gpt2-large", help="language model that scores the samples")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs"), help="folder for the models and their results"
    )
    return parser


def is_hub_reachable() -> bool:
    """Tries the Hub once, because downloads would retry for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # its class depends on the HTTP library of huggingface_hub
        return False
    return True


def main(args: argparse.Namespace):
    if not constants.HF_HUB_OFFLINE and not is_hub_reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        AutoConfig.from_pretrained(args.scorer)
    except OSError:
        reason = "the Hub cannot be reached, and the model is not cached" if constants.HF_HUB_OFFLINE else "not found"
        raise SystemExit(f"error: --scorer: cannot load {args.scorer}: {reason}.") from None
    tables = []
    for name in args.models:
        tables.append(compare(name, measure(name, args)))
        print(f"\n{tables[-1]}\n", flush=True)
    (args.output_dir / "published.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    if args.quick:
        print(f"These are rough figures from {QUICK_SAMPLES} samples; the published ones are from 1024.")
    print(f"Samples, tables and plots: {args.output_dir}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    main(make_parser().parse_args())
