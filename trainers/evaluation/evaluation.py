# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation of a model or of texts: these, their figures, and where they are written."""

import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.hub.card import add_results

from ..data import find_text_column, load_texts, pack_dataset
from .arguments import FLOW_ONLY, EvaluationArguments, check_arguments
from .frontier import perplexity_at_entropy, plot_frontier
from .mauve import check_mauve, compute_mauve, embed_texts
from .metric import confidence_intervals, load_gen_ppl
from .repetition import repetition_figures, vocabulary_of
from .report import describe_evaluation, frontier_table, plot, table, throughput_table
from .sources import Setting, load_source
from .throughput import measure_throughput


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]], args: EvaluationArguments) -> list[str]:
    """The texts, as they are scored."""
    # The tokenizer of the published evaluation on LM1B made "it's" of "it ' s", which that of transformers 5 does only if
    # it is told to.
    clean_up = True if args.protocol == "published" and isinstance(tokenizer, BertTokenizer) else None
    return tokenizer.batch_decode(
        tokens, skip_special_tokens=not args.keep_special_tokens, clean_up_tokenization_spaces=clean_up
    )


def load_lines(path: str, text_column: str | None = None) -> list[str]:
    """
    The texts of a file.

    Args:
        path (`str`): A txt, json, jsonl, csv or parquet file.
        text_column (`str`, *optional*): The column of the texts, which a txt file has none of.
    """
    try:
        dataset = load_texts(train_file=path, validation_percentage=0)["train"]
    except (OSError, ValueError) as error:  # which may be about another argument than `train_file`
        raise ValueError(
            str(error).removeprefix("`train_file`: ").replace("`train_file` must be", "A file of texts must be")
        ) from error
    texts = list(dataset[find_text_column(dataset, None if path.endswith(".txt") else text_column)])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`text_column`: not all of its values in {path} are texts; name another.")
    return texts


class GenPPLEvaluation:
    """
    Measures the texts of a model, or of a file: generative perplexity, entropy, diversity, copies and time.

    What is wrong with the arguments shows when the object is made, before there is any text or file. Several processes
    share the generation; the main one scores.

    Args:
        args ([`EvaluationArguments`]): What to measure, and where to write it.

    Raises:
        `ValueError`: for arguments that cannot be used, with their names in backticks.
        `OSError`: for models and files that are not there.
    """

    def __init__(self, args: EvaluationArguments):
        self.args = args
        self.output = Path(args.output_dir)
        if (self.output / "results.json").exists():
            raise ValueError(f"`output_dir`: {self.output} has results already; name another directory.")
        passed = [name for name in FLOW_ONLY if getattr(args, name) is not None]
        check_arguments(args)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.metric = load_gen_ppl() if self.accelerator.is_main_process else None
        self.source = None if args.model is None else load_source(args, self.accelerator, passed)
        self.entropy_tokenizer = None if args.tokenizer is None else AutoTokenizer.from_pretrained(args.tokenizer)
        if self.source is not None:
            self.sampling = self.source.sampling
        else:
            names = ("length", "max_length", "scorer_dtype", "tokenizer")
            self.sampling = {name: getattr(args, name) for name in names if getattr(args, name) is not None}

        self.samples = self.reference = self.training_texts = self.vocabulary = None
        if self.accelerator.is_main_process:
            self._check_context()
            self.score(["a text"], None)
            if args.samples_file is not None:
                self.samples = self._load_cut(args.samples_file)
            if args.reference_file is not None:
                self.reference = self._load_cut(args.reference_file, args.reference_packing)
            if args.train_file is not None:
                self.training_texts = load_lines(args.train_file, args.text_column)
            if args.words_file is not None:
                self.vocabulary = vocabulary_of(Path(args.words_file).read_text(encoding="utf-8").splitlines())
            if args.mauve_model is not None:
                AutoConfig.from_pretrained(args.mauve_model)
                check_mauve()

    def _check_context(self):
        """Raises a `ValueError` where the scorer cannot read texts that are as long as the protocol wants."""
        args = self.args
        scorer_config = AutoConfig.from_pretrained(args.scorer)
        if scorer_config.model_type in FLOW_MODEL_TYPES:
            raise ValueError("`scorer` must be a causal language model, such as gpt2-large, and not a flow-based one.")
        context = getattr(scorer_config, "max_position_embeddings", None)
        if args.protocol == "published" and context is not None and context < args.max_length:
            raise ValueError(
                f"`protocol` published cuts texts at the model's {args.max_length} tokens, but `scorer` reads {context}: "
                "pass one that reads more."
            )

    def _load_cut(self, path: str, packing: str = "texts") -> tuple[list[str], list[list[int]] | None]:
        """Texts of a file and their tokens, as many as of the model and as long."""
        args = self.args
        number = args.num_samples * len(args.seeds)
        texts = load_lines(path, args.text_column)
        if self.source is not None:
            tokenizer, length = self.source.tokenizer, self.source.length
        else:
            tokenizer, length = self.entropy_tokenizer, args.length
        if packing == "wrapped":
            blocks = pack_dataset(Dataset.from_dict({"text": texts}), tokenizer, length)[:number]["input_ids"]
            return decode(tokenizer, blocks, args), blocks
        texts = texts[:number]
        if length is None:
            return texts, None
        tokens = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        return decode(tokenizer, tokens, args), tokens

    def generate(self, setting: Setting) -> tuple[list[dict], list[int], float]:
        """
        The texts of all processes.

        Args:
            setting ([`Setting`]): A row of the table.

        Returns:
            `tuple[list[dict], list[int], float]`: rows with `seed`, `index`, `tokens` and `num_forward_passes`; the number of
            tokens of each up to its end; and the seconds of one device for each.
        """
        args, accelerator, source = self.args, self.accelerator, self.source
        source.warm_up(setting)
        work = (accelerator.num_processes, accelerator.process_index, args.batch_size)
        batches = [(seed, batch) for seed in args.seeds for batch in source.batches(range(args.num_samples), *work)]
        rows = []
        progress = tqdm(
            total=sum(len(batch) for _, batch in batches),
            desc=f"Generating {setting.name}".strip(),
            unit="text",
            disable=not accelerator.is_main_process,
        )
        start = time.perf_counter()
        with progress:
            for seed, batch in batches:
                for index, sample in zip(batch, source.write(setting, batch, seed)):
                    rows.append({"seed": seed, "index": index, **vars(sample)})
                progress.update(len(batch))
        seconds = time.perf_counter() - start  # the tokens have come to the host
        rows = sorted(gather_object(rows), key=lambda row: (row["seed"], row["index"]))
        return rows, [row.pop("num_tokens") for row in rows], sum(gather_object([seconds])) / len(rows)

    def score(self, texts: list[str], tokens: list[list[int]] | None) -> dict[str, Any]:
        """
        What the metric says of texts, with the intervals of its figures.

        Args:
            texts (`list[str]`): What is scored.
            tokens (`list[list[int]]`, *optional*): The tokens of the model, for the entropy and the diversity.
        """
        if self.entropy_tokenizer is not None:
            tokens = self.entropy_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        result = self.metric.compute(
            predictions=texts,
            token_ids=tokens,
            model_id=self.args.scorer,
            batch_size=self.args.scorer_batch_size,
            max_length=self.args.max_length,
            dtype=self.args.scorer_dtype,
            device=str(self.accelerator.device),
        )
        return result | confidence_intervals(result, self.args.bootstrap)

    def _generate_all(self) -> list[dict[str, Any]]:
        """The texts at every setting, which are written to files: rows without figures yet, with `texts` and `tokens`."""
        rows = []
        for setting in self.source.settings:
            samples, num_tokens, seconds = self.generate(setting)
            texts = decode(self.source.tokenizer, [sample["tokens"] for sample in samples], self.args)
            mean = sum(sample["num_forward_passes"] for sample in samples) / len(samples)
            row = {
                **setting.to_dict(),
                "num_forward_passes": mean * self.source.networks,  # every network takes a pass each step
                "seconds_per_text": seconds,
                "texts": texts,
                "tokens": [sample["tokens"][:number] for sample, number in zip(samples, num_tokens)],
            }
            rows.append(row if setting.num_steps is not None else {"source": "ancestral", **row})
            if self.accelerator.is_main_process:
                name = "_".join(part for part in ("samples", setting.name) if part)
                with open(self.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
                    for sample, text in zip(samples, texts):
                        file.write(json.dumps({"text": text, **sample}, ensure_ascii=False) + "\n")
        return rows

    def _measure_throughput(self) -> list[dict[str, Any]]:
        """Texts and tokens a second of the main process, for all but the temperatures, which do not change them."""
        rows = []
        for setting in dict.fromkeys(replace(setting, temperature=None) for setting in self.source.settings):
            measured = measure_throughput(
                lambda size, setting=setting: sum(
                    s.num_tokens for s in self.source.write(setting, list(range(size)), 0)
                ),
                tqdm(self.args.batch_sizes, desc="Batch sizes"),
            )
            rows += [setting.to_dict() | row for row in measured]
        return rows

    def _add_repetition(self, rows: list[dict[str, Any]]):
        """Adds self-BLEU, copies, real words and MAUVE to the rows."""
        args = self.args
        text_lists = [row["texts"] for row in rows]
        if self.training_texts is not None and self.vocabulary is None:
            self.vocabulary = vocabulary_of(self.training_texts)
        further = (self.training_texts, self.vocabulary, args.ngram_sizes, args.bootstrap)
        for row, figures in zip(rows, repetition_figures(text_lists, *further)):
            row |= figures
        if args.mauve_model is None:
            return
        options = {"batch_size": args.scorer_batch_size, "device": self.accelerator.device}
        features = [embed_texts(texts, args.mauve_model, **options) for texts in text_lists]
        for row, values in zip(rows[:-1], features):
            # Of k-means, which depends on where it starts
            row["mauve_seeds"] = [compute_mauve(values, features[-1], seed=seed) for seed in range(5)]
            row["mauve"] = sum(row["mauve_seeds"]) / 5

    def _find_frontiers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The perplexity of each sampler and number of steps at the entropy of the reference, which is the last row."""
        curves: dict[tuple, list[dict[str, Any]]] = {}
        for row in rows[:-1]:
            curves.setdefault((row.get("num_steps"), row.get("sampler")), []).append(row)
        results = []
        for curve in curves.values():
            temperatures = [row["temperature"] for row in curve]
            names = {name: curve[0][name] for name in ("num_steps", "sampler") if name in curve[0]}
            results.append(names | perplexity_at_entropy(temperatures, curve, rows[-1], self.args.bootstrap))
        return results

    def run(self) -> dict[str, Any] | None:
        """
        Generates, scores, and writes texts, tables and plots.

        Returns:
            `dict[str, Any]`: what is written to `results.json`, in the main process.
        """
        args = self.args
        self.output.mkdir(parents=True, exist_ok=True)

        # First everything that the processes share, then what the main process does alone.
        rows = [] if self.source is None else self._generate_all()
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return None
        throughput = []
        if self.source is not None:
            throughput = [] if args.batch_sizes is None else self._measure_throughput()
            self.source.cpu()
        for name, part in (("samples", self.samples), ("reference", self.reference)):
            if part is not None:
                rows.append({"source": name, "texts": part[0], "tokens": part[1]})
        for row in rows:
            row |= self.score(row["texts"], row["tokens"])
        self._add_repetition(rows)
        has_frontier = args.temperatures is not None
        frontiers = self._find_frontiers(rows) if has_frontier and self.reference is not None else []
        per_text = ("texts", "tokens", "perplexities", "token_counts", "entropies")
        results = [{name: value for name, value in row.items() if name not in per_text} for row in rows]

        evaluation = {
            "scorer": args.scorer,
            "num_samples": args.num_samples * len(args.seeds) if self.samples is None else len(self.samples[0]),
            "seeds": args.seeds,
            "sampling": self.sampling,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "results": [row for row in results if row.get("source") != "reference"],
        }
        everything = {**evaluation, "arguments": vars(args), "results": results}
        tables = [table(results)]
        if frontiers:
            everything["at_reference_entropy"] = frontiers
            tables.append(frontier_table(frontiers))
        if throughput:
            everything["throughput"] = throughput
            tables.append(throughput_table(throughput))
        report = "\n\n".join([*tables, describe_evaluation(evaluation)])
        (self.output / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
        (self.output / "results.md").write_text(report + "\n", encoding="utf-8")
        if has_frontier:
            plot_frontier(results, self.output / "frontier.png")
        else:
            plot(results, self.output / "results.png")
        print(f"\n{report}\n\nTexts, tables and plot: {self.output}")
        if args.update_card:
            add_results(args.model, evaluation, revision=args.revision)
        return everything
