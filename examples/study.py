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
GPT-2, masked diffusion (MDLM), uniform-state diffusion (Duo), FLM and FMLM beside each other, on a text of one's own or on the
definitions of a dictionary: equal widths, parameters, texts, optimizer steps, and searches for the learning rate.

    python examples/study.py data examples/recipes/study_definitions.yaml    # texts and tokenizer
    python examples/study.py search examples/recipes/study_definitions.yaml  # a learning rate for each kind of model
    python examples/study.py train examples/recipes/study_definitions.yaml   # all models, and one that scores; --only for some
    python examples/study.py sample examples/recipes/study_definitions.yaml  # texts at all numbers of steps, and likelihoods
    python examples/study.py report examples/recipes/study_definitions.yaml  # scores, tables and pictures
    python examples/study.py keep examples/recipes/study_words.yaml          # the flow map, small enough for a repository

Every stage skips what is there and goes on with what was interrupted. A flag after the YAML file takes precedence over it.
"""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import wordnet
from datasets import Dataset, DatasetInfo, load_from_disk
from peers.averaging import AveragedTrainer
from study_models import CONTENDERS, Contender
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
from transformers.trainer_utils import get_last_checkpoint

from modeling_flm import FLMConfig, FMLMModel
from modeling_flm.hub.records import TRAINING_NAME
from modeling_flm.tokenization_flm import has_characters_only
from modeling_flm.trainers import (
    DataCollatorForFLM,
    find_text_column,
    load_gen_ppl,
    load_texts,
    pack_dataset,
    train_tokenizer,
)
from modeling_flm.trainers.evaluation.frontier import perplexity_at_entropy
from modeling_flm.trainers.evaluation.repetition import repetition_figures, vocabulary_of
from modeling_flm.trainers.scripts import ScriptParser


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


# Parts of the training after which the average of the weights is kept, to see what more of it brings.
FRACTIONS = (0.25, 0.5, 1.0)


@dataclass
class StudyArguments:
    """What to compare, and how long."""

    output_dir: str = field(metadata={"help": "Where everything is written."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "A txt, jsonl, csv or parquet file of texts. By default WordNet's definitions."},
    )
    description: str = field(
        default="definitions of WordNet, a dictionary of English",
        metadata={"help": "What the texts are, for model cards."},
    )
    wordnet_dir: str | None = field(default=None, metadata={"help": "Where WordNet is, if not where Debian puts it."})
    tokenizer: str = field(
        default="bpe",
        metadata={
            "help": "bpe, or char for characters, or word: a text at a time; text8: 27 characters, packed.",
            "choices": ["bpe", "char", "word", "text8"],
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of a tokenizer that is not text8."})
    length: int = field(default=32, metadata={"help": "Tokens of a text; longer ones are left out, unless packed."})
    num_held_out: int = field(default=2000, metadata={"help": "Texts for validation, and as many for the test."})

    hidden_size: int = field(default=128, metadata={"help": "Of all models."})
    num_hidden_layers: int = field(
        default=4, metadata={"help": "Of all models but GPT-2, which has as many parameters."}
    )
    num_attention_heads: int = field(default=4, metadata={"help": "Of all models."})
    dropout: float = field(default=0.0, metadata={"help": "Of all models."})

    models: list[str] = field(default_factory=lambda: list(CONTENDERS), metadata={"help": "Which to compare."})
    only: list[str] | None = field(default=None, metadata={"help": "Train or sample only these of them."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "A training of each model for each."})
    prompt_fraction: float = field(
        default=0.0, metadata={"help": "Share of the texts of which flows and flow maps learn to write a part only."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts of an optimizer step."})
    max_steps: int = field(
        default=5000, metadata={"help": "Optimizer steps of all models but those that are distilled."}
    )
    distillation_steps: int = field(default=2500, metadata={"help": "Those of the distilled, beside their teacher's."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps in which the learning rate rises."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3], metadata={"help": "Those to search among."}
    )
    search_steps: int = field(default=500, metadata={"help": "Optimizer steps at each of them."})
    ema_decay: float = field(default=0.998, metadata={"help": "Of the moving average of all models."})
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})

    scorer_hidden_size: int = field(default=192, metadata={"help": "Of the GPT-2 that scores."})
    scorer_num_hidden_layers: int = field(default=6, metadata={"help": "Its blocks."})
    scorer_max_steps: int = field(default=8000, metadata={"help": "Its optimizer steps."})

    keep_dir: str | None = field(
        default=None, metadata={"help": "Where to keep a flow map in bfloat16, for `keep`, such as outputs/kept."}
    )

    num_samples: int = field(default=512, metadata={"help": "Texts of each model and number of steps."})
    num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "Numbers of forward passes."}
    )
    temperatures: list[float] = field(
        default_factory=lambda: [0.7, 0.85, 1.0], metadata={"help": "Of the texts, where they can have one."}
    )
    num_times: int = field(default=32, metadata={"help": "How often a text is noised for a bound."})
    num_likelihood_texts: int = field(default=500, metadata={"help": "Held-out texts whose likelihood is measured."})


# Texts


def read_texts(args: StudyArguments) -> list[str]:
    """All texts, in random order."""
    if args.train_file is None:
        texts = list(wordnet.definitions(wordnet.find_wordnet(args.wordnet_dir)))
    else:
        dataset = load_texts(train_file=args.train_file, validation_percentage=0)["train"]
        texts = dataset[find_text_column(dataset)]
    texts = list(dict.fromkeys(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[index] for index in order]


def to_characters(text: str) -> str:
    """A text in the letters from a to z and single spaces."""
    return " ".join(re.findall("[a-z]+", text.lower()))


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, args: StudyArguments) -> Dataset:
    """Texts of one length: with an end, and what fills them up; or of characters one after the other, cut into blocks."""
    if has_characters_only(tokenizer):
        blocks = pack_dataset(Dataset.from_dict({"text": [f"{text} " for text in texts]}), tokenizer, args.length)
        input_ids = blocks["input_ids"][:]
    else:
        token_lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
        token_lists = [[*tokens, tokenizer.eos_token_id] for tokens in token_lists if len(tokens) < args.length]
        input_ids = [tokens + [tokenizer.pad_token_id] * (args.length - len(tokens)) for tokens in token_lists]
    info = DatasetInfo(description=args.description)
    return Dataset.from_dict({"input_ids": input_ids, "labels": input_ids}, info=info)


def make_data(args: StudyArguments):
    """Writes the texts of each split, their tokens, and the tokenizer."""
    folder = Path(args.output_dir, "data")
    if (folder / "done").exists():
        return
    texts = read_texts(args)
    if len(texts) <= 3 * args.num_held_out:
        raise SystemExit(f"error: --num_held_out {args.num_held_out} takes too many of {len(texts)} texts, twice")
    if args.tokenizer == "text8":
        texts = list(map(to_characters, texts))
    cuts = {"validation": slice(args.num_held_out), "test": slice(args.num_held_out, 2 * args.num_held_out)}
    cuts["train"] = slice(2 * args.num_held_out, None)
    tokenizer = train_tokenizer(texts[cuts["train"]], args.tokenizer, args.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, cut in cuts.items():
        dataset = tokenize(texts[cut], tokenizer, args)
        dataset.save_to_disk(folder / name)
        (folder / f"{name}.txt").write_text(
            "\n".join(decode(dataset["input_ids"][:], tokenizer)) + "\n", encoding="utf-8"
        )
        print(f"{name}: {len(dataset):,} texts of {args.length} tokens, from {len(texts[cut]):,}, such as")
        print(f"    {decode(dataset['input_ids'][:1], tokenizer)[0]}")
    (folder / "done").touch()


def decode(token_lists: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of tokens, up to their end, each on one line."""
    end = tokenizer.eos_token_id
    if end is not None:
        token_lists = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in token_lists]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(token_lists, skip_special_tokens=True)]


@dataclass
class Data:
    """What the stages after the first one read."""

    tokenizer: PreTrainedTokenizerBase
    tokens: dict[str, Dataset]
    texts: dict[str, list[str]]

    @classmethod
    def load(cls, args: StudyArguments) -> "Data":
        folder = Path(args.output_dir, "data")
        if not (folder / "done").exists():
            raise SystemExit(f"error: {folder} has no texts yet: run the stage `data` first")
        splits = ("train", "validation", "test")
        return cls(
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            {name: load_from_disk(folder / name) for name in splits},
            {name: (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in splits},
        )


# Training


class Snapshots(TrainerCallback):
    """Saves the averaged weights after parts of the training."""

    def __init__(self, trainer: Trainer, folders: dict[int, Path]):
        self.trainer, self.folders = trainer, folders

    def on_step_end(self, args, state, control, **kwargs):
        folder = self.folders.get(state.global_step)
        if folder is not None:
            self.trainer.save_model(folder)


def new_config(tokenizer: PreTrainedTokenizerBase, args: StudyArguments) -> FLMConfig:
    """That of all models on the blocks of an FLM."""
    return FLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.length,
        dropout=args.dropout,
        attn_logit_softcapping=None,  # for the fast attention of PyTorch
        bos_token_id=None,  # texts have an end, and no token that begins them
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def training_settings(folder: Path, max_steps: int, learning_rate: float, seed: int, args: StudyArguments) -> dict:
    """What all trainings have in common. The rate stays where it is, so that any part of a training is one by itself."""
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
    """Trains, from where it was interrupted, and keeps the averaged weights."""
    max_steps = trainer.args.max_steps
    folders = {max(1, round(max_steps * part)): folder / snapshot_name(part) for part in fractions}
    trainer.add_callback(Snapshots(trainer, folders))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir) if folder.is_dir() else None)
    print(f"{folder} took {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")


def snapshot_name(fraction: float) -> str:
    return f"after-{fraction:g}"


def train_scorer(data: Data, args: StudyArguments):
    """A larger GPT-2 on the same texts, by which all others are scored."""
    folder = Path(args.output_dir, "scorer")
    if (folder / snapshot_name(1.0) / "config.json").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(Path(args.output_dir, "data", "tokenizer"))
    dataset, begin = data.tokens, tokenizer.bos_token_id
    if begin is not None:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
        )
        pad = tokenizer.pad_token_id
        dataset = {
            name: split.map(
                lambda row: {"input_ids": [begin, *(token for token in row["input_ids"] if token != pad)]},
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
            bos_token_id=begin,
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
        ema_decay=args.ema_decay,
    )
    run(trainer, folder)


def search(data: Data, args: StudyArguments):
    """Trains each kind of model for a while at each learning rate, and keeps the one with the smallest loss on held-out texts."""
    path = Path(args.output_dir, "learning_rates.json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name in selected(args):
        contender = CONTENDERS[name]
        if contender.searched_as is not None or name in found:
            continue
        losses = {}
        for learning_rate in args.learning_rates:
            settings = training_settings(
                Path(args.output_dir, "search", f"{name}-{learning_rate:g}"), args.search_steps, learning_rate, 0, args
            )
            set_seed(0)
            trainer = contender.new_trainer(
                new_config(data.tokenizer, args),
                {**settings, "save_strategy": "no"},
                args.ema_decay,
                data.tokens,
                data.tokenizer,
                None,
                args.prompt_fraction,
            )
            trainer.train()
            torch.manual_seed(0)  # of the peers' noise
            losses[learning_rate] = trainer.evaluate()["eval_loss"]
            print(f"{name}: learning rate {learning_rate:g}, held-out loss {losses[learning_rate]:.4f}", flush=True)
        found = json.loads(path.read_text()) if path.is_file() else {}  # another process may have written to it
        found[name] = {"learning_rate": min(losses, key=losses.get), "losses": losses}
        path.write_text(json.dumps(found, indent=2) + "\n")


def selected(args: StudyArguments) -> list[str]:
    """The models to work on now, teachers before those that they teach."""
    names = args.models if args.only is None else [name for name in args.models if name in args.only]
    return sorted(names, key=lambda name: CONTENDERS[name].teacher is not None)


def train(data: Data, args: StudyArguments):
    """Trains everything that is not there."""
    if args.only is None or "scorer" in args.only:
        train_scorer(data, args)
    found = json.loads(Path(args.output_dir, "learning_rates.json").read_text())
    for seed in args.seeds:
        for name in selected(args):
            contender, folder = CONTENDERS[name], model_folder(name, seed, args)
            if (folder / "log.json").is_file():
                continue
            teacher, max_steps = None, args.max_steps
            if contender.teacher is not None:
                teacher_folder = model_folder(contender.teacher, seed, args) / snapshot_name(1.0)
                if not teacher_folder.is_dir():
                    raise SystemExit(f"error: {name} needs its teacher: train {contender.teacher} first")
                teacher, max_steps = CONTENDERS[contender.teacher].load(teacher_folder), args.distillation_steps
            learning_rate = found[contender.searched_as or name]["learning_rate"]
            settings = training_settings(folder / "training", max_steps, learning_rate, seed, args)
            set_seed(seed)
            trainer = contender.new_trainer(
                new_config(data.tokenizer, args),
                settings,
                args.ema_decay,
                data.tokens,
                data.tokenizer,
                teacher,
                args.prompt_fraction,
            )
            print(f"Training {folder}: {trainer.model.num_parameters():,} parameters", flush=True)
            run(trainer, folder, FRACTIONS)


def model_folder(name: str, seed: int, args: StudyArguments) -> Path:
    return Path(args.output_dir, "models", f"{name}-{seed}")


# Texts and likelihoods


def settings_of(contender: Contender, fraction: float, args: StudyArguments) -> list[tuple[int, float]]:
    """Numbers of steps and temperatures of a model; of one in the middle of its training those that show most."""
    if contender.sampler == "one pass a token":
        all_steps = [args.length]
    else:
        all_steps = args.num_steps if fraction == 1 else [min(args.num_steps), max(args.num_steps)]
    temperatures = args.temperatures if fraction == 1 else [1.0]
    return [
        (num_steps, temperature)
        for num_steps in all_steps
        for temperature in temperatures
        if temperature == 1 or contender.has_temperature(num_steps)
    ]


@torch.no_grad()
def sample(data: Data, args: StudyArguments):
    """Writes texts of every model, and the likelihoods of held-out ones."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    test = torch.tensor(data.tokens["test"]["input_ids"][: args.num_likelihood_texts])
    jobs = [
        (name, seed, fraction)
        for seed in args.seeds
        for name in selected(args)
        for fraction in FRACTIONS
        if (model_folder(name, seed, args) / snapshot_name(fraction)).is_dir()
    ]
    for name, seed, fraction in tqdm(jobs, desc="Models", unit="model"):
        contender, folder = CONTENDERS[name], model_folder(name, seed, args)
        path = folder / snapshot_name(fraction) / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        done = {(row["num_steps"], row["temperature"]) for row in rows if "num_steps" in row}
        model = contender.load(folder / snapshot_name(fraction)).to(device).eval()
        for num_steps, temperature in settings_of(contender, fraction, args):
            if (num_steps, temperature) in done:
                continue
            tokens, seconds = [], 0.0
            generator = torch.Generator().manual_seed(seed)
            for start in range(0, args.num_samples, args.batch_size):
                number = min(args.batch_size, args.num_samples - start)
                begin = time.perf_counter()
                output = contender.sample(model, number, args.length, num_steps, temperature, generator=generator)
                tokens += output.tolist()
                seconds += time.perf_counter() - begin
            row = {
                "num_steps": num_steps,
                "temperature": temperature,
                "seconds_per_text": seconds / args.num_samples,
                "texts": decode(tokens, data.tokenizer),
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not any("nats_per_text" in row for row in rows):
            values = torch.cat(
                [
                    contender.log_likelihood(
                        model, batch.to(device), args.num_times, torch.Generator().manual_seed(index)
                    ).cpu()
                    for index, batch in enumerate(test.split(args.batch_size))
                ]
            )
            row = {"nats_per_text": -values.mean().item(), "error": values.std().item() / len(values) ** 0.5}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# Report


def read_samples(args: StudyArguments) -> tuple[list[dict], list[dict]]:
    """Rows of texts and rows of likelihoods, with what made them."""
    rows, likelihoods = [], []
    for seed in args.seeds:
        for name in args.models:
            for fraction in FRACTIONS:
                path = model_folder(name, seed, args) / snapshot_name(fraction) / "samples.jsonl"
                for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                    row = {"model": name, "seed": seed, "fraction": fraction, **json.loads(line)}
                    (rows if "texts" in row else likelihoods).append(row)
    return rows, likelihoods


def score(texts: list[str], data: Data, args: StudyArguments) -> dict:
    """Perplexity, by the scorer of the study, and entropy of texts."""
    return load_gen_ppl().compute(
        predictions=texts,
        model_id=str(Path(args.output_dir, "scorer", snapshot_name(1.0))),
        batch_size=args.batch_size,
        token_ids=data.tokenizer(texts, add_special_tokens=False)["input_ids"],
    )


def spread(values: list[float | None], digits: int) -> str:
    """The mean of what several seeds gave, and how far they lie from it."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    text = f"{mean:.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {max(known) - mean:.{digits}f}"


def report(data: Data, args: StudyArguments):
    """Scores all texts, prints tables, and draws pictures."""
    rows, likelihoods = read_samples(args)
    if not rows:
        raise SystemExit("error: there are no texts yet: run the stage `sample` first")
    vocabulary = vocabulary_of(data.texts["train"])
    path = Path(args.output_dir, "scores.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    reference = {"model": "text", "texts": data.texts["test"][: args.num_samples]}
    for row in tqdm([reference, *rows], desc="Scoring", unit="setting"):
        key = " ".join(str(row.get(name)) for name in ("model", "seed", "fraction", "num_steps", "temperature"))
        if key not in known:
            known[key] = score(row["texts"], data, args)
            path.write_text(json.dumps(known) + "\n")
        row["scores"] = known[key]
    figures = repetition_figures([row["texts"] for row in (reference, *rows)], data.texts["train"], vocabulary)
    for row, each in zip((reference, *rows), figures):
        row.update(each)
    for row in rows:
        curve = [other for other in rows if setting(other)[:-1] == setting(row)[:-1]]
        row["matched"] = perplexity_at_entropy(
            [other["temperature"] for other in curve], [other["scores"] for other in curve], reference["scores"]
        )["gen_ppl"]
    lines = [f"Text: perplexity {reference['scores']['gen_ppl']:.1f}, entropy {reference['scores']['entropy']:.3f}, "]
    lines[0] += f"real words {100 * reference['real_words']:.1f} %, {len(data.tokens['train']):,} texts to learn from."
    lines += ["", *quality_table(rows, reference, args), "", *likelihood_table(likelihoods, data, args)]
    lines += ["", *compute_table(rows, likelihoods, args), "", *sample_list(rows, args)]
    text = "\n".join(lines) + "\n"
    Path(args.output_dir, "report.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, reference, Path(args.output_dir, "study.png"))
    summary = [{name: value for name, value in row.items() if name not in ("texts", "scores")} for row in rows]
    for short, row in zip(summary, rows):
        short |= {name: row["scores"][name] for name in ("gen_ppl", "entropy")}
    Path(args.output_dir, "report.json").write_text(json.dumps(summary, indent=1) + "\n")


def setting(row: dict) -> tuple:
    """What distinguishes rows, the temperature last."""
    return tuple(row[name] for name in ("model", "seed", "fraction", "num_steps", "temperature"))


def over_seeds(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def quality_table(rows: list[dict], reference: dict, args: StudyArguments) -> list[str]:
    """Everything about the texts of whole trainings at temperature 1, and the perplexity at the entropy of the text."""
    lines = [
        "| model | forward passes | ms a text | perplexity | entropy | at the text's entropy | real words, % | self-BLEU | "
        "copied whole, % |",
        "|" + "---|" * 9,
    ]
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name}):
            same = over_seeds(rows, model=name, num_steps=num_steps, temperature=1.0, fraction=1.0)
            if same:
                cells = [
                    spread([1000 * row["seconds_per_text"] for row in same], 2),
                    spread([row["scores"]["gen_ppl"] for row in same], 1),
                    spread([row["scores"]["entropy"] for row in same], 3),
                    spread([row["matched"] for row in same], 1),
                    spread([100 * row["real_words"] for row in same], 1),
                    spread([row["self_bleu"] for row in same], 3),
                    spread([100 * row["copied_texts"] for row in same], 1),
                ]
                lines.append(f"| {name} | {num_steps} | " + " | ".join(cells) + " |")
    return lines


def likelihood_table(likelihoods: list[dict], data: Data, args: StudyArguments) -> list[str]:
    """The likelihoods of held-out texts, of whole trainings."""
    number = sum(len(text.encode()) for text in data.texts["test"][: args.num_likelihood_texts])
    number /= min(args.num_likelihood_texts, len(data.texts["test"]))
    lines = ["| model | nats a text | standard error | bits a byte |", "|---|---|---|---|"]
    for name in args.models:
        same = over_seeds(likelihoods, model=name, fraction=1.0)
        if same:
            sign = "" if name == "gpt2" else "≤ "
            nats = [row["nats_per_text"] for row in same]
            bits = spread([value / number / math.log(2) for value in nats], 3)
            errors = spread([row["error"] for row in same], 2)
            lines.append(f"| {name} | {sign}{spread(nats, 2)} | {errors} | {sign}{bits} |")
    return lines


def compute_table(rows: list[dict], likelihoods: list[dict], args: StudyArguments) -> list[str]:
    """What more training brings: the perplexity of the fewest and of the most steps after parts of the training."""
    lines = ["| model | forward passes | " + " | ".join(f"after {part:g}" for part in FRACTIONS) + " |"]
    lines.append("|" + "---|" * (2 + len(FRACTIONS)))
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name and row["fraction"] < 1}):
            cells = [
                spread(
                    [
                        row["scores"]["gen_ppl"]
                        for row in over_seeds(rows, model=name, num_steps=num_steps, fraction=part, temperature=1.0)
                    ],
                    1,
                )
                for part in FRACTIONS
            ]
            lines.append(f"| {name} | {num_steps} | " + " | ".join(cells) + " |")
    return lines


def sample_list(rows: list[dict], args: StudyArguments) -> list[str]:
    """The first texts of each model."""
    lines = []
    for name in args.models:
        for num_steps in sorted({row["num_steps"] for row in rows if row["model"] == name}):
            same = over_seeds(rows, model=name, num_steps=num_steps, temperature=1.0, fraction=1.0)
            if same:
                lines += [f"{name}, {num_steps} forward pass{'es' if num_steps > 1 else ''}", ""]
                lines += [f"- {text}" for text in same[0]["texts"][:5]] + [""]
    return lines


def plot(rows: list[dict], reference: dict, path: Path):
    """Perplexity at the text's entropy, or where it is out of reach at temperature 1, against passes and seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    keys: tuple[Callable, Callable] = (lambda row: row["num_steps"], lambda row: 1000 * row["seconds_per_text"])
    for axis, key, label in zip(axes, keys, ("forward passes", "milliseconds a text")):
        for color, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
            own = over_seeds(rows, model=name, temperature=1.0, fraction=1.0)
            points = []
            for num_steps in sorted({row["num_steps"] for row in own}):
                same = over_seeds(own, num_steps=num_steps)
                matched = [row["matched"] for row in same]
                reached = None not in matched
                values = matched if reached else [row["scores"]["gen_ppl"] for row in same]
                points.append(
                    (np.mean([key(row) for row in same]), np.mean(values), min(values), max(values), reached)
                )
            x, y, low, high, reached = (np.array(column) for column in zip(*points))
            axis.errorbar(x, y, yerr=(y - low, high - y), color=f"C{color}", capsize=3, label=name)
            for filled in (True, False):
                axis.scatter(
                    x[reached == filled],
                    y[reached == filled],
                    facecolor=f"C{color}" if filled else "white",
                    edgecolor=f"C{color}",
                    zorder=3,
                )
        axis.axhline(reference["scores"]["gen_ppl"], linestyle="--", color="gray", label="text")
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity at the entropy of the text\n(hollow: at temperature 1, entropy out of reach)")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# A model to keep


def keep(data: Data, args: StudyArguments):
    """Writes the flow map of the first seed in bfloat16, with its tokenizer and what is known of its training."""
    if args.keep_dir is None:
        raise SystemExit("error: --keep_dir: name the folder to write")
    source = model_folder("fmlm", args.seeds[0], args) / snapshot_name(1.0)
    model = FMLMModel.from_pretrained(source).to(torch.bfloat16)
    model.save_pretrained(args.keep_dir)
    data.tokenizer.save_pretrained(args.keep_dir)
    shutil.copy(source / TRAINING_NAME, args.keep_dir)
    for path in Path(args.keep_dir).glob("*.py"):  # the code of the model, which is here, and which publishing adds
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
        raise SystemExit(f"error: say what to do first: {', '.join(STAGES)}")
    (args,) = parser.parse_args_and_config(arguments[1:])
    for name in (*args.models, *(args.only or ())):
        if name not in CONTENDERS and name != "scorer":
            raise SystemExit(f"error: --models and --only: there is no {name}, only {', '.join(CONTENDERS)}")
    if arguments[0] == "data":
        make_data(args)
    else:
        STAGES[arguments[0]](Data.load(args), args)


if __name__ == "__main__":
    main()
