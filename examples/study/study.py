# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Compare GPT-2, masked diffusion (MDLM), uniform-state diffusion (Duo), FLM and FMLM on the same texts, with equal widths, parameters,
training examples and optimizer steps, and the same learning-rate search.

    python examples/study/study.py data examples/study/recipes/definitions.yaml    # texts and tokenizer
    python examples/study/study.py search examples/study/recipes/definitions.yaml  # a learning rate for each model
    python examples/study/study.py train examples/study/recipes/definitions.yaml   # all models and the scorer; --only for some
    python examples/study/study.py sample examples/study/recipes/definitions.yaml  # samples at each number of steps, likelihoods
    python examples/study/study.py report examples/study/recipes/definitions.yaml  # scores, tables and a plot
    python examples/study/study.py keep examples/study/recipes/words.yaml          # the FMLM in bfloat16

Each stage skips what is already there and resumes what was interrupted. Flags after the YAML file take precedence over it.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from study_data import FRACTIONS, Data, StudyArguments, decode, make_data, model_folder, snapshot_name
from study_models import STUDY_MODELS, StudyModel
from study_report import report
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from modeling_flm import FLMConfig, FMLMModel
from modeling_flm.hub.records import TRAINING_NAME, to_json
from modeling_flm.trainers import AveragedTrainer, DataCollatorForFLM, EMACallback
from modeling_flm.trainers.commands.command_line import ScriptParser, friendly_errors
from modeling_flm.trainers.resuming import find_checkpoint


# Training


class Snapshots(TrainerCallback):
    """
    Saves the averaged weights during training.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        folders (`dict[int, Path]`): Folders to save to, by the number of optimizer steps.
    """

    def __init__(self, trainer: Trainer, folders: dict[int, Path]):
        self.trainer, self.folders = trainer, folders

    def on_step_end(self, args, state, control, **kwargs):
        folder = self.folders.get(state.global_step)
        if folder is not None:
            self.trainer.save_model(folder)


def new_config(tokenizer: PreTrainedTokenizerBase, args: StudyArguments) -> FLMConfig:
    """Returns the configuration of the FLM, from which all models take their sizes."""
    return FLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.length,
        dropout=args.dropout,
        attn_logit_softcapping=None,  # allows PyTorch's fused attention
        bos_token_id=None,  # examples end with a token, but do not begin with one
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def training_settings(folder: Path, max_steps: int, learning_rate: float, seed: int, args: StudyArguments) -> dict:
    """Returns the settings of all trainings. The learning rate is constant, so a snapshot is like the end of a shorter training."""
    return {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": args.warmup_steps,
        "adam_beta2": 0.95,
        "save_steps": args.save_steps,
        "save_total_limit": 1,
        "logging_steps": max(1, max_steps // 50),
        "report_to": [],
        "bf16": args.bf16,
        "seed": seed,
    }


def run(trainer: Trainer, folder: Path, fractions: tuple[float, ...] = (1.0,)):
    """Trains, resuming from the last checkpoint if there is one, and saves the averaged weights after each fraction of the steps."""
    max_steps = trainer.args.max_steps
    folders = {max(1, round(max_steps * part)): folder / snapshot_name(part) for part in fractions}
    trainer.add_callback(Snapshots(trainer, folders))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=find_checkpoint(folder))
    print(f"{folder} took {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    (folder / "log.json").write_text(to_json(trainer.state.log_history, indent=1) + "\n")


def train_scorer(data: Data, args: StudyArguments):
    """Trains a larger GPT-2 on the same texts, which scores the samples of all models."""
    folder = Path(args.output_dir, "scorer")
    if (folder / snapshot_name(1.0) / "config.json").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(Path(args.output_dir, "data", "tokenizer"))
    dataset, bos = data.tokens, tokenizer.bos_token_id
    if bos is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
        )
        pad = tokenizer.pad_token_id
        dataset = {
            name: split.map(
                lambda row: {"input_ids": [bos, *(token for token in row["input_ids"] if token != pad)]},
                remove_columns="labels",
            )
            for name, split in data.tokens.items()
        }
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=args.length + 2,
            n_embd=args.scorer_hidden_size,
            n_layer=args.scorer_num_hidden_layers,
            n_head=args.num_attention_heads,
            bos_token_id=bos,
            eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.0,
        )
    )
    settings = training_settings(folder / "training", args.scorer_max_steps, 1e-3, 0, args)
    trainer = AveragedTrainer(
        model,
        TrainingArguments(**settings),
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=DataCollatorForFLM(tokenizer.pad_token_id),
        processing_class=tokenizer,
        ema=EMACallback(args.ema_decay),
    )
    run(trainer, folder)


def read_learning_rates(args: StudyArguments) -> dict[str, dict]:
    """Reads the results of the stage `search`, by model."""
    path = Path(args.output_dir, "learning_rates.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def search(data: Data, args: StudyArguments):
    """Trains each model briefly at each learning rate, and keeps the rate with the lowest loss on the validation texts."""
    for name in selected(args):
        study_model = STUDY_MODELS[name]
        if study_model.searched_as is not None or name in read_learning_rates(args):
            continue
        losses = {}
        for learning_rate in args.learning_rates:
            folder = Path(args.output_dir, "search", f"{name}-{learning_rate:g}")
            settings = training_settings(folder, args.search_steps, learning_rate, 0, args)
            settings["save_strategy"] = "no"
            set_seed(0)
            config = new_config(data.tokenizer, args)
            trainer = study_model.new_trainer(config, settings, data, args, teacher=None)
            trainer.train()
            torch.manual_seed(0)  # for the noise of the peers' losses
            losses[learning_rate] = trainer.evaluate()["eval_loss"]
            print(f"{name}: learning rate {learning_rate:g}, validation loss {losses[learning_rate]:.4f}", flush=True)
        found = read_learning_rates(args)  # again, because another process may have added to the file
        found[name] = {"learning_rate": min(losses, key=losses.get), "losses": losses}
        Path(args.output_dir, "learning_rates.json").write_text(to_json(found, indent=2) + "\n")


def selected(args: StudyArguments) -> list[str]:
    """Returns the models to work on, teachers before their students."""
    names = args.models if args.only is None else [name for name in args.models if name in args.only]
    return sorted(names, key=lambda name: STUDY_MODELS[name].teacher is not None)


def train(data: Data, args: StudyArguments):
    """Trains the scorer and every model that is not trained yet."""
    if args.only is None or "scorer" in args.only:
        train_scorer(data, args)
    learning_rates = read_learning_rates(args)
    for seed in args.seeds:
        for name in selected(args):
            study_model, folder = STUDY_MODELS[name], model_folder(name, seed, args)
            if study_model.weights_of is not None or (folder / "log.json").is_file():
                continue
            searched_as = study_model.searched_as or name
            if searched_as not in learning_rates:
                raise SystemExit(
                    f"error: {name} needs the learning rate of {searched_as}: run the stage `search` first"
                )
            teacher, max_steps = None, args.max_steps
            if study_model.teacher is not None:
                teacher_folder = model_folder(study_model.teacher, seed, args) / snapshot_name(1.0)
                if not teacher_folder.is_dir():
                    raise SystemExit(f"error: {name} needs its teacher: train {study_model.teacher} first")
                teacher, max_steps = STUDY_MODELS[study_model.teacher].load(teacher_folder), args.distillation_steps
            learning_rate = learning_rates[searched_as]["learning_rate"]
            settings = training_settings(folder / "training", max_steps, learning_rate, seed, args)
            set_seed(seed)
            config = new_config(data.tokenizer, args)
            trainer = study_model.new_trainer(config, settings, data, args, teacher)
            print(f"Training {folder}: {trainer.model.num_parameters():,} parameters", flush=True)
            run(trainer, folder, FRACTIONS)


# Samples and likelihoods


def sampling_settings(study_model: StudyModel, fraction: float, args: StudyArguments) -> list[tuple[int, float]]:
    """
    Returns the numbers of steps and temperatures to sample with. Snapshots from during the training are sampled with the fewest and the
    most steps only, at temperature 1.
    """
    if study_model.one_pass_per_token:
        all_steps = [args.length]
    else:
        all_steps = args.num_steps if fraction == 1 else [min(args.num_steps), max(args.num_steps)]
    temperatures = args.temperatures if fraction == 1 else [1.0]
    return [
        (num_steps, temperature)
        for num_steps in all_steps
        for temperature in temperatures
        if temperature == 1 or num_steps > 1 or study_model.has_temperature_at_one_step
    ]


def append_row(path: Path, row: dict):
    """Appends a line to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_json(row) + "\n")


@torch.no_grad()
def sample(data: Data, args: StudyArguments):
    """Samples from every model, and measures the likelihoods of test texts."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    test = torch.tensor(data.tokens["test"]["input_ids"][: args.num_likelihood_texts])
    jobs = [
        (name, seed, fraction)
        for seed in args.seeds
        for name in selected(args)
        for fraction in FRACTIONS
        if (model_folder(STUDY_MODELS[name].weights_of or name, seed, args) / snapshot_name(fraction)).is_dir()
    ]
    for name, seed, fraction in tqdm(jobs, desc="Models", unit="model"):
        study_model, snapshot = STUDY_MODELS[name], snapshot_name(fraction)
        path = model_folder(name, seed, args) / snapshot / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        done = {(row["num_steps"], row["temperature"]) for row in rows if "num_steps" in row}
        model = study_model.load(model_folder(study_model.weights_of or name, seed, args) / snapshot).to(device).eval()
        for num_steps, temperature in sampling_settings(study_model, fraction, args):
            if (num_steps, temperature) in done:
                continue
            tokens, seconds = [], 0.0
            generator = torch.Generator().manual_seed(seed)
            for first in range(0, args.num_samples, args.batch_size):
                number = min(args.batch_size, args.num_samples - first)
                start = time.perf_counter()
                output = study_model.sample(model, number, args.length, num_steps, temperature, generator=generator)
                tokens += output.tolist()
                seconds += time.perf_counter() - start
            row = {
                "num_steps": num_steps,
                "temperature": temperature,
                "seconds_per_text": seconds / args.num_samples,
                "texts": decode(tokens, data.tokenizer),
            }
            append_row(path, row)
        if study_model.weights_of is None and not any("nats_per_text" in row for row in rows):
            values = []
            for index, batch in enumerate(test.split(args.batch_size)):
                generator = torch.Generator().manual_seed(index)
                values.append(study_model.log_likelihood(model, batch.to(device), args.num_times, generator).cpu())
            values = torch.cat(values)
            error = values.std().item() / len(values) ** 0.5
            append_row(path, {"nats_per_text": -values.mean().item(), "error": error})


# Keeping a model


def keep(data: Data, args: StudyArguments):
    """Saves the FMLM of the first seed in bfloat16, with its tokenizer and training record."""
    if args.keep_dir is None:
        raise SystemExit("error: pass --keep_dir, the folder to write")
    source = model_folder("fmlm", args.seeds[0], args) / snapshot_name(1.0)
    model = FMLMModel.from_pretrained(source).to(torch.bfloat16)
    model.save_pretrained(args.keep_dir)
    data.tokenizer.save_pretrained(args.keep_dir)
    shutil.copy(source / TRAINING_NAME, args.keep_dir)
    for path in Path(args.keep_dir).glob("*.py"):  # the model's code, which publishing adds
        path.unlink()
    size = sum(path.stat().st_size for path in Path(args.keep_dir).iterdir())
    print(f"{args.keep_dir}: {model.num_parameters():,} parameters, {size / 1e6:.1f} MB")


STAGES = {"data": None, "search": search, "train": train, "sample": sample, "report": report, "keep": keep}


def main(arguments: list[str] | None = None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ScriptParser([StudyArguments], description=__doc__)
    if not arguments or arguments[0] not in STAGES:
        if set(arguments) & {"-h", "--help"}:
            parser.print_help()
            return
        raise SystemExit(f"error: pass a stage first: {', '.join(STAGES)}")
    (args,) = parser.parse_args_and_config(arguments[1:])
    for name in (*args.models, *(args.only or ())):
        if name not in STUDY_MODELS and name != "scorer":
            raise SystemExit(
                f"error: --models and --only: there is no model {name}; choose from {', '.join(STUDY_MODELS)}"
            )
    with friendly_errors(StudyArguments):
        if arguments[0] == "data":
            make_data(args)
        else:
            STAGES[arguments[0]](Data.load(args), args)


if __name__ == "__main__":
    main()
