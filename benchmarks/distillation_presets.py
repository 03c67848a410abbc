# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare the distillation presets on the quickstart's grammar, starting from the FLM that the quickstart trains:

    python examples/quickstart.py
    python benchmarks/distillation_presets.py

Prints a Markdown table with the share of grammatical samples at each number of steps, the share of distinct ones at one step, and the
seconds of an optimizer step. Every preset takes the quickstart's settings and number of optimizer steps; self-distillation, which starts
from scratch, also takes the steps of the FLM, and the second stage distills the result of `two_network` with as many steps again.
Distribution matching goes on from the quickstart's FMLM, for `--matching_steps`.
"""

import argparse
import sys
import time
from pathlib import Path

from datasets import disable_progress_bars
from transformers import PreTrainedModel, set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import grammar  # noqa: E402
import quickstart  # noqa: E402

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel  # noqa: E402
from modeling_flm.trainers import DistributionMatchingTrainer, FMLMTrainer, FMLMTrainingArguments  # noqa: E402
from modeling_flm.trainers.evaluation.report import markdown_table  # noqa: E402


PRESETS = ("single_stage", "self_distillation", "two_network", "second_stage", "distribution_matching")


def make_parser() -> argparse.ArgumentParser:
    parser = quickstart.make_parser()
    parser.description = __doc__
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS, help="presets to compare")
    parser.add_argument("--teacher", default="outputs/quickstart/flm", help="folder of the quickstart's FLM")
    parser.add_argument("--student", default="outputs/quickstart/fmlm", help="folder of the quickstart's FMLM")
    parser.add_argument("--matching_steps", type=int, default=500, help="optimizer steps of distribution_matching")
    parser.add_argument("--matching_learning_rate", type=float, default=5e-4, help="its learning rate")
    parser.set_defaults(output_dir="outputs/distillation_presets")
    return parser


def main(args: argparse.Namespace):
    disable_progress_bars()
    set_seed(args.seed)
    tokenizer, dataset, _ = quickstart.load_stories(args.seed)
    flm = FLMModel.from_pretrained(args.teacher)

    def train(
        preset: str, model: PreTrainedModel, teacher: PreTrainedModel | None, max_steps: int
    ) -> tuple[list[dict], float]:
        if preset == "distribution_matching":
            trainer_class = DistributionMatchingTrainer
            settings = quickstart.training_settings(args, preset, max_steps)
            settings |= {"learning_rate": args.matching_learning_rate, "lr_scheduler_type": "linear"}
            del settings["lr_scheduler_kwargs"]
        else:
            trainer_class = FMLMTrainer
            settings = quickstart.distillation_settings(args, preset, max_steps)
        training_args = FMLMTrainingArguments.from_preset(preset, **settings)
        trainer = trainer_class(model, training_args, teacher, train_dataset=dataset, processing_class=tokenizer)
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / max_steps
        trainer.save_model()
        model = type(model).from_pretrained(settings["output_dir"]).to(flm.device)
        return quickstart.measure(preset, model, tokenizer, quickstart.FMLM_STEPS, grammar.is_valid, args), seconds

    steps, rows = args.distillation_steps, {}
    for preset in args.presets:
        if preset == "single_stage":
            rows[preset] = train(preset, FMLMModel.from_flm(flm), flm, steps)
        elif preset == "self_distillation":
            untrained = FMLMModel(FMLMModel.from_flm(flm).config)
            rows[preset] = train(preset, untrained, None, args.max_steps + steps)
        elif preset == "two_network":
            rows[preset] = train(preset, FMLMTwoNetworkModel.from_flm(flm), None, steps)
        elif preset == "distribution_matching":
            student = FMLMModel.from_pretrained(args.student)
            rows[preset] = train(preset, student, flm, args.matching_steps)
        else:
            teacher = FMLMTwoNetworkModel.from_pretrained(f"{args.output_dir}/two_network")
            rows[preset] = train(preset, FMLMModel.from_flm(flm), teacher, steps)

    table = []
    for preset, (measured, seconds) in rows.items():
        shares = [f"{100 * row['valid']:.1f}" for row in measured]
        table.append([f"`{preset}`", *shares, f"{100 * measured[0]['distinct']:.1f}", f"{seconds:.2f}"])
    print("\nGrammatical samples in %, by steps\n")
    headings = ["preset", *map(str, quickstart.FMLM_STEPS), "distinct at 1, %", "seconds a training step"]
    print(markdown_table(headings, table))


if __name__ == "__main__":
    main(make_parser().parse_args())
