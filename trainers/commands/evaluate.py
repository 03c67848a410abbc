# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Measure the texts of a model: generative perplexity, entropy, diversity, copies of the training texts, and time.

    flm-evaluate --model outputs/fmlm --num_steps 1 2 4 8 --output_dir outputs/fmlm_evaluation
    accelerate launch -m modeling_flm.trainers.commands.evaluate --model me/flm --num_steps 32 128 1024 --output_dir outputs/flm_evaluation
    flm-evaluate --model me/fmlm --num_steps 4 16 --samplers flow_map bridge --temperatures 0.7 0.8 0.9 1 \
        --reference_file heldout.txt --train_file train.txt --output_dir outputs/frontier
    flm-evaluate --model gpt2 --length 128 --temperatures 0.8 0.9 1 --output_dir outputs/gpt2
    flm-evaluate --samples_file texts.jsonl --reference_file heldout.txt --output_dir outputs/texts
    flm-evaluate --model me/fmlm --gamma 0.8 --protocol published --output_dir outputs/as_published

Parameters of sampling that are not passed are those of the model's `generation_config.json`. --temperatures makes the frontier
of perplexity and entropy for each number of steps and sampler, `frontier.png`, and with --reference_file the perplexity at the
entropy of its texts, which is what to compare models by. --train_file finds what was copied from it, and how many words are
real; --mauve_model adds MAUVE, and --batch_sizes texts a second. --protocol published measures as the paper does, for figures
that stand beside the paper's: special tokens stay in the texts, these are cut at the model's length in tokens of the scorer,
and GPT-2 large scores 1024 of them in float32.

The output directory gets the texts (`samples_N.jsonl` for N steps), the tables as `results.md` and `results.json`, and a plot
of quality against time, or the frontier. --reference_file adds a row for texts of people, to compare with. With --update_card
the results become part of the model: of its folder, from where `flm-publish` takes them into the card, or of its card on the
Hub. Every flag can also stand in a YAML file, given as the first argument. Needs `pip install modeling-flm[evaluate]`.
"""

from ..evaluation import EvaluationArguments, GenPPLEvaluation
from .command_line import ScriptParser, check_model, explained


def make_parser() -> ScriptParser:
    return ScriptParser([EvaluationArguments], description=__doc__)


def evaluate(args: EvaluationArguments):
    with explained(EvaluationArguments):
        if args.model is not None:
            check_model("--model", args.model)
        evaluation = GenPPLEvaluation(args)
    evaluation.run()


def main(arguments: list[str] | None = None):
    try:
        evaluate(*make_parser().parse_args_and_config(arguments))
    except OSError as error:  # of names that do not exist
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
