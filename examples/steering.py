# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Steer generation on the stories of the quickstart, and draw what each way does: guidance by a worse model, fresh noise, a
reward for a word, and texts of which a part is given.

    python examples/steering.py

Trains what is not in --output_dir yet (an FLM, another for a fifth of the steps, the FMLM of the first, and an FLM and an FMLM
that learn to be given parts of a text), which takes a quarter of an hour, measures grammatical samples, and draws a plot.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import grammar
import matplotlib
import torch
from datasets import Dataset
from quickstart import distillation_settings, load_stories, new_flm, training_settings
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from modeling_flm import FLMModel, FMLMModel
from modeling_flm.trainers import FLMTrainer, FLMTrainingArguments, FMLMTrainer, FMLMTrainingArguments
from modeling_flm.trainers.evaluation.plots import share_errors


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


GUIDANCE_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
REWARD_SCALES = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORD = "red"
PREFIX_LENGTH = 12


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=1900, help="optimizer steps of the FLM")
    parser.add_argument("--prompt_steps", type=int, default=3000, help="of the FLM that learns to be given parts")
    parser.add_argument("--distillation_steps", type=int, default=1700, help="optimizer steps of each FMLM")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--prompt_fraction", type=float, default=0.9, help="of the examples of models for prompts")
    parser.add_argument("--num_samples", type=int, default=500, help="samples of each measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/steering")
    return parser


def trained(verb: str, name: str, args: argparse.Namespace, make_trainer: Callable[[], FLMTrainer]) -> PreTrainedModel:
    """The model with this name, trained if it is not there."""
    folder = Path(args.output_dir, name)
    if not (folder / "model.safetensors").is_file():
        print(f"{verb} {folder}", flush=True)
        set_seed(args.seed)  # whichever of them are there already
        trainer = make_trainer()
        trainer.train()
        trainer.save_model()
    return AutoModel.from_pretrained(folder)


def train_flm(
    name: str, max_steps: int, prompt_fraction: float, tokenizer, dataset: Dataset, args: argparse.Namespace
) -> FLMModel:
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
    tokenizer,
    dataset: Dataset,
    args: argparse.Namespace,
    preset: str = "single_stage",
    **config_overrides,
) -> FMLMModel:
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
    """Rows of what was measured, each of samples of a model at a number of steps."""

    def __init__(
        self, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
    ):
        self.models = models
        self.tokenizer = tokenizer
        self.args = args
        self.rows = []

    def add(self, part: str, model: str, num_steps: int, scale: float | None = None, **options):
        """The share of samples that are grammatical, of those that have the word, and of different ones."""
        num_samples = self.args.num_samples
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
        """Autoguidance at several scales, by the FLM that was trained for a fifth of the time."""
        for model, num_steps in (("flm", 4), ("flm", 8), ("fmlm", 4)):
            for scale in GUIDANCE_SCALES:
                options = {"guidance_model": self.models["weak"], "guidance_scale": scale}
                self.add("guidance", model, num_steps, scale, **options)

    def fresh_noise(self):
        """Stochastic sampling with the flow map."""
        for num_steps in (2, 4, 8):
            for gamma in GAMMAS:
                self.add("gamma", "fmlm", num_steps, gamma, gamma=gamma)

    def reward(self):
        """A reward for a word: how often it is expected in the text."""
        token = self.tokenizer.convert_tokens_to_ids(WORD)
        for model, num_steps in (("flm", 8), ("flm", 16), ("fmlm", 1), ("fmlm", 4)):
            for scale in REWARD_SCALES:
                options = {"reward": lambda delta: delta[..., token].sum(dim=-1), "reward_scale": scale}
                self.add("reward", model, num_steps, scale, **options)

    def known(self) -> dict[str, dict]:
        """Arguments of `generate` for stories whose first words, or of which a random half, are known."""
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
        """Stories that are completed."""
        for kind, options in self.known().items():
            for model in ("flm", "flm_prompts", "fmlm_prompts"):
                for num_steps in (1, 2, 4, 8, 16):
                    self.add(kind, model, num_steps, **options)


def show(row: dict):
    numbers = ("valid", "with_word", "distinct")
    print(
        "  ".join(f"{name} {value:.1%}" if name in numbers else str(value) for name, value in row.items()), flush=True
    )


def draw(panel: plt.Axes, rows: list[dict], x: str, y: str, style: str = "o-", **options):
    """A line of shares in per cent, with their intervals of 95 %."""
    shares = [row[y] for row in rows]
    errors = share_errors(shares, rows[0]["num_samples"])
    options = {"capsize": 2, "markersize": 4, "elinewidth": 0.8, **options}
    panel.errorbar([row[x] for row in rows], [100 * share for share in shares], yerr=errors, fmt=style, **options)


def plot(rows: list[dict], path: Path):
    """Two panels for the reward, and one for each other way; all with intervals."""
    figure, panels = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    names = {"flm": "FLM, held clean", "flm_prompts": "FLM, trained for it", "fmlm_prompts": "FMLM, trained for it"}
    scales = {"guidance": "guidance scale", "gamma": "gamma", "reward": "reward scale"}
    known = {"prefix": f"First {PREFIX_LENGTH} words known", "half": "A random half known"}
    titles = {
        "guidance": "Autoguidance",
        "gamma": "Fresh noise",
        "reward": f"Reward for '{WORD}': grammatical",
        **known,
    }
    kinds = [(part, "valid") for part in titles]
    kinds.insert(2, ("reward", "with_word"))
    for panel, (part, share) in zip(panels.flat, kinds):
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
    panels[0, 2].set(title=f"Reward for '{WORD}': the word", ylim=(0, 139))  # with room for the legend
    panels[0, 2].set_yticks(range(0, 101, 20))
    figure.suptitle(f"{rows[0]['num_samples']} samples each; bars: 95 % intervals of sampling", fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def train_models(tokenizer, dataset: Dataset, args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The FLM and its FMLM, and those that learn to complete what is known."""
    common = (tokenizer, dataset, args)
    models = {"flm": train_flm("flm", args.max_steps, 0.0, *common)}
    models["fmlm"] = train_fmlm("fmlm", models["flm"], 0.0, *common)
    models["flm_prompts"] = train_flm("flm_prompts", args.prompt_steps, args.prompt_fraction, *common)
    models["fmlm_prompts"] = train_fmlm("fmlm_prompts", models["flm_prompts"], args.prompt_fraction, *common)
    return models


def report(name: str, rows: list[dict], plot: Callable[[list[dict], Path], None], args: argparse.Namespace):
    """Writes what was measured, and the plot of it."""
    folder = Path(args.output_dir)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, folder / f"{name}.png")
    print(f"\nPlot: {folder / f'{name}.png'}")


def main(args: argparse.Namespace):
    tokenizer, dataset, _ = load_stories(args.seed)
    models = train_models(tokenizer, dataset, args)
    models["weak"] = train_flm("weak", args.max_steps // 5, 0.0, tokenizer, dataset, args)

    measurements = Measurements(models, tokenizer, args)
    measurements.guidance()
    measurements.fresh_noise()
    measurements.reward()
    measurements.infills()
    report("steering", measurements.rows, plot, args)


if __name__ == "__main__":
    main(make_parser().parse_args())
