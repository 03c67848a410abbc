# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare the distillation presets on the quickstart's grammar, starting from the FLM that the quickstart trains:

    python examples/quickstart.py
    python benchmarks/distillation_presets.py

Prints a Markdown table with the share of grammatical samples at each number of steps. Every preset takes the quickstart's settings
and number of optimizer steps; self-distillation, which starts from scratch, also takes the steps of the FLM, and the second stage
distills the result of `two_network` with as many steps again.
"""

import argparse
import sys
from pathlib import Path

from datasets import disable_progress_bars
from transformers import PreTrainedModel, set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import grammar  # noqa: E402
import quickstart  # noqa: E402

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel  # noqa: E402
from modeling_flm.trainers import FMLMTrainer, FMLMTrainingArguments  # noqa: E402


PRESETS = ("single_stage", "self_distillation", "two_network", "second_stage")


def make_parser() -> argparse.ArgumentParser:
    parser = quickstart.make_parser()
    parser.description = __doc__
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS, help="presets to compare")
    parser.add_argument("--teacher", default="outputs/quickstart/flm", help="folder of the quickstart's FLM")
    parser.set_defaults(output_dir="outputs/distillation_presets")
    return parser


def main(args: argparse.Namespace):
    disable_progress_bars()
    set_seed(args.seed)
    tokenizer, dataset, _ = quickstart.load_stories(args.seed)
    flm = FLMModel.from_pretrained(args.teacher)

    def train(preset: str, model: PreTrainedModel, teacher: PreTrainedModel | None, max_steps: int) -> list[dict]:
        settings = quickstart.distillation_settings(args, preset, max_steps)
        training_args = FMLMTrainingArguments.from_preset(preset, **settings)
        trainer = FMLMTrainer(model, training_args, teacher, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        model = type(model).from_pretrained(settings["output_dir"]).to(flm.device)
        return quickstart.measure(preset, model, tokenizer, quickstart.FMLM_STEPS, grammar.is_valid, args)

    steps, rows = args.distillation_steps, {}
    for preset in args.presets:
        if preset == "single_stage":
            rows[preset] = train(preset, FMLMModel.from_flm(flm), flm, steps)
        elif preset == "self_distillation":
            untrained = FMLMModel(FMLMModel.from_flm(flm).config)
            rows[preset] = train(preset, untrained, None, args.max_steps + steps)
        elif preset == "two_network":
            rows[preset] = train(preset, FMLMTwoNetworkModel.from_flm(flm), None, steps)
        else:
            teacher = FMLMTwoNetworkModel.from_pretrained(f"{args.output_dir}/two_network")
            rows[preset] = train(preset, FMLMModel.from_flm(flm), teacher, steps)

    print("\n| preset | " + " | ".join(map(str, quickstart.FMLM_STEPS)) + " |")
    print("|---" * (len(quickstart.FMLM_STEPS) + 1) + "|")
    for preset, measured in rows.items():
        print(f"| `{preset}` | " + " | ".join(f"{100 * row['valid']:.1f} %" for row in measured) + " |")


if __name__ == "__main__":
    main(make_parser().parse_args())
