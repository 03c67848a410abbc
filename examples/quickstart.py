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
Train a small flow-based language model from nothing and watch it write: five minutes on a laptop's CPU.

    python examples/quickstart.py                          # stories of a small grammar, checked word for word
    python examples/quickstart.py --train_file corpus.txt  # a text of your own
    python examples/quickstart.py --dataset roneneldan/TinyStories

It trains, measures samples at several numbers of steps, shows one text forming, draws a plot and saves the model.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import grammar
import matplotlib
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TextDiffusionStreamer, set_seed

from modeling_flm import FLMConfig, FLMModel
from trainers import FLMTrainer, FLMTrainingArguments, load_texts, pack_dataset, train_tokenizer


matplotlib.use("Agg")  # draws to files, also where there is no screen
import matplotlib.pyplot as plt  # noqa: E402


NUM_STEPS = (1, 2, 4, 8, 16, 64)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a dataset of the Hub to learn from, or its folder")
    parser.add_argument("--train_file", help="a txt, json, jsonl, csv or parquet file to learn from")
    parser.add_argument("--vocab_size", type=int, default=2048, help="the largest vocabulary for texts of your own")
    parser.add_argument("--length", type=int, default=64, help="the length in tokens of texts of your own")
    parser.add_argument("--max_steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--num_samples", type=int, default=500, help="samples to measure at each number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="outputs/quickstart")
    return parser.parse_args()


def load_stories(seed: int) -> tuple[PreTrainedTokenizerBase, Dataset, int]:
    """Stories of the grammar: the tokenizer, the training examples and their length."""
    rng = random.Random(seed)
    stories = [grammar.sample_story(rng) for _ in range(50_000)]
    tokenizer = train_tokenizer(stories, "word", vocab_size=1000)
    dataset = Dataset.from_dict({"input_ids": tokenizer(stories, add_special_tokens=False)["input_ids"]})
    return tokenizer, dataset, grammar.NUM_WORDS


def load_own_texts(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Dataset, int]:
    """The same for the texts that the user names, with a tokenizer trained on them and wrapped packing."""
    texts = load_texts(dataset_name=args.dataset, train_file=args.train_file, validation_percentage=0)["train"]
    column = "text" if "text" in texts.column_names else texts.column_names[0]
    tokenizer = train_tokenizer((row[column] for row in texts), "bpe", args.vocab_size)
    return tokenizer, pack_dataset(texts, tokenizer, args.length), args.length


def train(
    args: argparse.Namespace, model: FLMModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> FLMTrainer:
    decay_steps = int(0.3 * args.max_steps)
    warmup_steps = min(50, args.max_steps - decay_steps)
    training_args = FLMTrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "linear"},
        warmup_steps=warmup_steps,
        ema_decay=0.995,
        logging_steps=max(1, args.max_steps // 30),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = FLMTrainer(model=model, args=training_args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return trainer


def measure(model: FLMModel, tokenizer: PreTrainedTokenizerBase, num_samples: int, is_valid, seed: int) -> list[dict]:
    """Samples at several numbers of steps: how many are grammatical, how many differ, how long they take."""
    rows = []
    print(f"\n{num_samples} samples at each number of steps")
    print(f"{'steps':>5}  {'grammatical':>11}  {'distinct':>8}  {'ms/text':>7}  a sample")
    for num_steps in NUM_STEPS:
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        tokens = model.generate(
            num_samples=num_samples, num_steps=num_steps, batch_size=num_samples, generator=generator
        )
        seconds = time.perf_counter() - start
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        row = {
            "num_steps": num_steps,
            "valid": None if is_valid is None else sum(map(is_valid, texts)) / num_samples,
            "distinct": len(set(texts)) / num_samples,
            "seconds": seconds / num_samples,
        }
        rows.append(row)
        valid = "-" if row["valid"] is None else f"{row['valid']:.1%}"
        sample = " ".join(texts[0].split())[:60]
        print(f"{num_steps:>5}  {valid:>11}  {row['distinct']:>8.1%}  {1000 * row['seconds']:>7.2f}  {sample}...")
    return rows


def plot(rows: list[dict], log_history: list[dict], path: Path):
    """The training loss, and for the grammar the share of grammatical samples against the number of steps."""
    has_validity = rows[0]["valid"] is not None
    figure, axes = plt.subplots(1, 2 if has_validity else 1, figsize=(9 if has_validity else 5, 3.6), squeeze=False)
    logs = [row for row in log_history if "loss" in row]
    axes[0, 0].plot([row["step"] for row in logs], [row["loss"] for row in logs])
    axes[0, 0].set(xlabel="optimizer steps", ylabel="cross-entropy (nats per token)", title="Training")
    axes[0, 0].set_ylim(bottom=0)
    if has_validity:
        steps = [row["num_steps"] for row in rows]
        axes[0, 1].plot(steps, [100 * row["valid"] for row in rows], marker="o", label="grammatical")
        axes[0, 1].set_xscale("log", base=2)
        axes[0, 1].set_xticks(steps, labels=[str(step) for step in steps])
        axes[0, 1].set(xlabel="sampling steps", ylabel="% of samples", ylim=(0, 102), title="FLM, grammatical samples")
        axes[0, 1].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    args = parse_arguments()
    set_seed(args.seed)
    own_texts = args.dataset is not None or args.train_file is not None
    tokenizer, dataset, length = load_own_texts(args) if own_texts else load_stories(args.seed)
    print(f"Learning from {len(dataset):,} texts of {length} tokens over {len(tokenizer):,} words, such as:\n")
    print(f"    {tokenizer.decode(dataset[0]['input_ids'])}\n")

    model = FLMModel(
        FLMConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=4,
            max_position_embeddings=length,
            dropout=0.0,  # every example is new
            attn_logit_softcapping=None,  # for the fast attention of PyTorch
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = train(args, model, tokenizer, dataset)
    # What was saved: the moving average of the weights
    model = FLMModel.from_pretrained(args.output_dir).to(trainer.args.device)
    rows = measure(model, tokenizer, args.num_samples, None if own_texts else grammar.is_valid, args.seed)

    print("\nA text forms, in 8 steps:\n")
    if sys.stdout.isatty():
        show = {"streamer": TextDiffusionStreamer(tokenizer, sleep_time=0.5)}
    else:
        show = {"callback": lambda step, _, tokens: print(f"    {step}  {tokenizer.decode(tokens[0])}")}
    model.generate(num_steps=8, generator=torch.Generator().manual_seed(args.seed + 1), **show)
    picture = Path(args.output_dir) / "quickstart.png"
    plot(rows, trainer.state.log_history, picture)
    print(f"\nPlot: {picture}\nModel: {args.output_dir}. To use it, here or on a machine without this package:\n")
    print("    from transformers import AutoModel, AutoTokenizer")
    print(f'    model = AutoModel.from_pretrained("{args.output_dir}", trust_remote_code=True)')
    print(f'    tokenizer = AutoTokenizer.from_pretrained("{args.output_dir}")')
    print("    print(tokenizer.batch_decode(model.generate(num_samples=4, num_steps=16)))")


if __name__ == "__main__":
    main()
