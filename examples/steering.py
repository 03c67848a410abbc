# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Steer generation on the quickstart's stories, and plot the effect of each method: guidance by a weaker model, fresh noise, a reward for a
word, and prompts.

    python examples/steering.py

The script trains the models that are not in --output_dir yet, in a quarter of an hour: an FLM, a weaker FLM with a fifth of the steps, the
FMLM distilled from the first, and an FLM and an FMLM trained with prompts. It then measures how many samples are grammatical.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import grammar
import matplotlib
import torch
from datasets import Dataset
from quickstart import add_training_arguments, distillation_settings, load_stories, new_flm, training_settings
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.hub.records import to_json
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, FMLMTrainingArguments
from modeling_flm.trainers.evaluation.plots import share_errors


matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402


GUIDANCE_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
REWARD_SCALES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORD = "red"
PREFIX_LENGTH = 12


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    parser.add_argument(
        "--prompt_steps", type=int, default=3000, help="optimizer steps of the FLM trained with prompts"
    )
    parser.add_argument(
        "--prompt_fraction", type=float, default=0.9, help="fraction of examples with a prompt, in that training"
    )
    parser.set_defaults(output_dir="outputs/steering")
    return parser


def trained(verb: str, name: str, args: argparse.Namespace, make_trainer: Callable[[], FLMTrainer]) -> PreTrainedModel:
    """Loads the model with this name, and trains it first if it is not there."""
    folder = Path(args.output_dir, name)
    if not (folder / "model.safetensors").is_file():
        print(f"{verb} {folder}", flush=True)
        set_seed(args.seed)  # so that a model does not depend on which others are already there
        trainer = make_trainer()
        trainer.train()
        trainer.save_model()
    return AutoModel.from_pretrained(folder)


def train_flm(
    name: str,
    max_steps: int,
    prompt_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: argparse.Namespace,
) -> FLMModel:
    """Returns an FLM, in `prompt_fraction` of whose training examples some tokens are known."""

    def make_trainer() -> FLMTrainer:
        settings = training_settings(args, name, max_steps)
        return FLMTrainer(
            new_flm(args, tokenizer, grammar.NUM_WORDS, per_token_timesteps=prompt_fraction > 0),
            FLMTrainingArguments(**settings, prompt_fraction=prompt_fraction),
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return trained("Training", name, args, make_trainer)


def train_fmlm(
    name: str,
    teacher: FLMModel,
    prompt_fraction: float,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: argparse.Namespace,
    preset: str = "single_stage",
    **config_overrides,
) -> FMLMModel:
    """Returns an FMLM distilled from `teacher`. `config_overrides` are fields of its configuration that differ from the teacher's."""

    def make_trainer() -> FMLMTrainer:
        settings = distillation_settings(args, name, args.distillation_steps)
        return FMLMTrainer(
            FMLMModel.from_flm(teacher, **config_overrides),
            FMLMTrainingArguments.from_preset(preset, **settings, prompt_fraction=prompt_fraction),
            teacher=teacher,
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return trained("Distilling", name, args, make_trainer)


class Measurements:
    """
    Measurements of samples.

    Args:
        models (`dict[str, PreTrainedModel]`): The models to sample from, by name.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        args (`argparse.Namespace`): The number of samples and the seed.

    Attributes:
        rows (`list[dict]`): A row for each measurement.
    """

    def __init__(
        self, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
    ):
        self.models = models
        self.tokenizer = tokenizer
        self.args = args
        self.rows = []

    def add(self, part: str, model: str, num_steps: int, scale: float | None = None, **options):
        """
        Measures which fractions of samples are grammatical, contain `WORD`, and are distinct.

        Args:
            part (`str`): Name of the experiment.
            model (`str`): Name of the model.
            num_steps (`int`): Number of steps.
            scale (`float`, *optional*): Value of the parameter that the experiment varies.
            options: Further arguments of `generate()`. Samples follow the flow (`gamma=0`) by default.
        """
        num_samples = self.args.num_samples
        options = {"gamma": 0.0, **options}
        output = self.models[model].generate(
            num_samples=num_samples,
            batch_size=num_samples,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed(self.args.seed),
            return_dict_in_generate=True,
            **options,
        )
        texts = self.tokenizer.batch_decode(output.sequences)
        row = {"part": part, "model": model, "num_steps": num_steps} | ({} if scale is None else {"scale": scale})
        row["forward_passes"] = output.num_forward_passes.float().mean().item()
        row["valid"] = sum(map(grammar.is_valid, texts)) / len(texts)
        row["with_word"] = sum(WORD in text.split() for text in texts) / len(texts)
        row["distinct"] = len(set(texts)) / len(texts)
        show(row)
        self.rows.append(row | {"num_samples": num_samples})

    def guidance(self):
        """Measures autoguidance at several scales, by the FLM with a fifth of the training."""
        for model, num_steps in (("flm", 4), ("flm", 8), ("fmlm", 4)):
            for scale in GUIDANCE_SCALES:
                options = {"guidance_model": self.models["weak"], "guidance_scale": scale}
                self.add("guidance", model, num_steps, scale, **options)

    def fresh_noise(self):
        """Measures stochastic sampling from the flow map."""
        for num_steps in (2, 4, 8):
            for gamma in GAMMAS:
                self.add("gamma", "fmlm", num_steps, gamma, gamma=gamma)

    def reward(self):
        """Measures a reward for a word: its expected number of occurrences."""
        token = self.tokenizer.convert_tokens_to_ids(WORD)

        def expected_count(delta: torch.Tensor) -> torch.Tensor:
            return delta[..., token].sum(dim=-1)

        for model, num_steps in (("flm", 8), ("flm", 16), ("fmlm", 1), ("fmlm", 4)):
            for scale in REWARD_SCALES:
                options = {"reward": expected_count, "reward_scale": scale}
                self.add("reward", model, num_steps, scale, **options)

    def known(self) -> dict[str, dict]:
        """Returns the arguments of `generate()` for stories with a known prefix, or a known random half."""
        rng = random.Random(self.args.seed + 1)
        stories = [grammar.sample_story(rng) for _ in range(self.args.num_samples)]
        input_ids = torch.tensor(self.tokenizer(stories, add_special_tokens=False)["input_ids"])
        generator = torch.Generator().manual_seed(self.args.seed)
        is_half = torch.rand(input_ids.shape, generator=generator).argsort(dim=1) < grammar.NUM_WORDS // 2
        return {
            "prefix": {"input_ids": input_ids[:, :PREFIX_LENGTH]},
            "half": {"input_ids": input_ids, "prompt_mask": ~is_half},
        }

    def infills(self):
        """Measures the completion of stories."""
        for part, options in self.known().items():
            for model in ("flm", "flm_prompts", "fmlm_prompts"):
                for num_steps in (1, 2, 4, 8, 16):
                    self.add(part, model, num_steps, **options)


def show(row: dict):
    """Prints a row."""
    fractions = ("valid", "with_word", "distinct")
    cells = (f"{name} {value:.1%}" if name in fractions else str(value) for name, value in row.items())
    print("  ".join(cells), flush=True)


def draw(panel: plt.Axes, rows: list[dict], x: str, y: str, style: str = "o-", **options):
    """Draws fractions in percent, with their 95 % intervals."""
    shares = [row[y] for row in rows]
    errors = share_errors(shares, rows[0]["num_samples"])
    options = {"capsize": 2, "markersize": 4, "elinewidth": 0.8, **options}
    panel.errorbar([row[x] for row in rows], [100 * share for share in shares], yerr=errors, fmt=style, **options)


def plot(rows: list[dict], path: Path):
    """Draws two panels for the reward, and one for each other method."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    names = {"flm": "FLM", "flm_prompts": "FLM, trained with prompts", "fmlm_prompts": "FMLM, trained with prompts"}
    scales = {"guidance": "guidance scale", "gamma": "gamma", "reward": "reward scale"}
    known = {"prefix": f"First {PREFIX_LENGTH} words known", "half": "A random half known"}
    titles = {
        "guidance": "Autoguidance",
        "gamma": "Fresh noise",
        "reward": f"Reward for '{WORD}': grammatical",
        **known,
    }
    contents = [(part, "valid") for part in titles]
    contents.insert(2, ("reward", "with_word"))
    for panel, (part, share) in zip(panels.flat, contents):
        lines = {}
        for row in rows:
            if row["part"] == part:
                steps = f"{row['num_steps']} step{'s' * (row['num_steps'] > 1)}"
                label = f"{row['model'].upper()}, {steps}" if part in scales else names[row["model"]]
                lines.setdefault(label, []).append(row)
        for label, line in lines.items():
            draw(panel, line, "scale" if part in scales else "num_steps", share, label=label)
        panel.set(title=titles[part], xlabel=scales.get(part, "sampling steps"))
        panel.set_ylabel("% grammatical" if share == "valid" else f"% with '{WORD}'")
        panel.set_ylim(50 if part in ("guidance", "gamma") else 0, 102)
        if part in known:
            panel.set_xscale("log", base=2)
            panel.set_xticks((1, 2, 4, 8, 16), labels=("1", "2", "4", "8", "16"))
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left" if share == "with_word" else "lower right", fontsize=9)
    panels[0, 2].set(title=f"Reward for '{WORD}': the word", ylim=(0, 139))  # leaves room for the legend
    panels[0, 2].set_yticks(range(0, 101, 20))
    figure.suptitle(f"{rows[0]['num_samples']} samples each; bars: 95 % sampling intervals", fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def train_models(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: argparse.Namespace
) -> dict[str, PreTrainedModel]:
    """Returns an FLM and its FMLM, and another FLM and its FMLM that are trained with prompts."""
    common = (tokenizer, dataset, args)
    models = {"flm": train_flm("flm", args.max_steps, 0.0, *common)}
    models["fmlm"] = train_fmlm("fmlm", models["flm"], 0.0, *common)
    models["flm_prompts"] = train_flm("flm_prompts", args.prompt_steps, args.prompt_fraction, *common)
    models["fmlm_prompts"] = train_fmlm("fmlm_prompts", models["flm_prompts"], args.prompt_fraction, *common)
    return models


def report(name: str, rows: list[dict], plot: Callable[[list[dict], Path], None], args: argparse.Namespace):
    """Writes the measurements as JSON, and their plot."""
    folder = Path(args.output_dir)
    (folder / f"{name}.json").write_text(to_json(rows, indent=2) + "\n")
    plot(rows, folder / f"{name}.png")
    print(f"\nPlot: {folder / f'{name}.png'}")


def main(args: argparse.Namespace):
    tokenizer, dataset, _ = load_stories(args.seed)
    models = train_models(tokenizer, dataset, args)
    models["weak"] = train_flm("weak", max(1, args.max_steps // 5), 0.0, tokenizer, dataset, args)

    measurements = Measurements(models, tokenizer, args)
    measurements.guidance()
    measurements.fresh_noise()
    measurements.reward()
    measurements.infills()
    report("steering", measurements.rows, plot, args)


if __name__ == "__main__":
    main(make_parser().parse_args())
