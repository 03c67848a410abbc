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
"""The evaluation of a model: its texts at several numbers of steps, their figures, and where they are written."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_flm.hub.card import add_results

from ..data import find_text_column, load_texts
from .arguments import GENERATION, EvaluationArguments, check_arguments
from .metric import confidence_intervals, load_gen_ppl
from .report import describe_evaluation, describe_sampling, plot, table
from .samples import generate_samples


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]], args: EvaluationArguments) -> list[str]:
    """The texts, as they are scored."""
    # The tokenizer of the published evaluation on LM1B made "it's" of "it ' s", which that of transformers 5 does only if
    # it is told to.
    clean_up = True if args.protocol == "published" and isinstance(tokenizer, BertTokenizer) else None
    return tokenizer.batch_decode(
        tokens, skip_special_tokens=not args.keep_special_tokens, clean_up_tokenization_spaces=clean_up
    )


class GenPPLEvaluation:
    """
    Measures the texts of a model at several numbers of steps: generative perplexity, entropy, diversity and time.

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
        check_arguments(args)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.metric = load_gen_ppl() if self.accelerator.is_main_process else None
        self.model = self._load_model(args.model, args.revision)
        self.guidance_model = None
        if args.guidance_model is not None:
            self.guidance_model = self._load_model(args.guidance_model, args.guidance_revision)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        length = args.length or self.model.generation_config.length or self.model.config.max_position_embeddings
        if args.protocol == "published":
            length = args.length = args.max_length = self.model.config.max_position_embeddings
        self.sampling = describe_sampling(args, self.model)

        generate_samples(self.model, [0], 0, num_steps=1, **self._options())
        self.reference = None
        if self.accelerator.is_main_process:
            self._check_context()
            self.score(["a text"], None)
            if args.reference_file is not None:
                self.reference = self._load_reference(length)

    def _load_model(self, name: str, revision: str) -> PreTrainedModel:
        options = {"revision": revision, "dtype": self.args.dtype}
        if self.args.attn_implementation is not None:
            options["attn_implementation"] = self.args.attn_implementation
        return AutoModel.from_pretrained(name, **options).to(self.accelerator.device).eval()

    def _options(self) -> dict[str, Any]:
        """The arguments of `generate()` but for the steps."""
        options = {name: getattr(self.args, name) for name in (*GENERATION, "batch_size")}
        options = {name: value for name, value in options.items() if value is not None}
        return options if self.guidance_model is None else {**options, "guidance_model": self.guidance_model}

    def _check_context(self):
        """Raises a `ValueError` where the scorer cannot read texts that are as long as the protocol wants."""
        args = self.args
        context = getattr(AutoConfig.from_pretrained(args.scorer), "max_position_embeddings", None)
        if args.protocol == "published" and context is not None and context < args.max_length:
            raise ValueError(
                f"`protocol` published cuts texts at the model's {args.max_length} tokens, but `scorer` reads {context}: "
                "pass one that reads more."
            )

    def _load_reference(self, length: int) -> tuple[list[str], list[list[int]]]:
        """Texts of people and their tokens, as many as of the model and as long."""
        args = self.args
        dataset = load_texts(train_file=args.reference_file, validation_percentage=0)["train"]
        texts = dataset[find_text_column(dataset, args.text_column)][: args.num_samples * len(args.seeds)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("`text_column`: not all of its values are texts; name another.")
        tokens = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length)["input_ids"]
        return decode(self.tokenizer, tokens, args), tokens

    def generate(self, num_steps: int) -> tuple[list[dict], float]:
        """
        The texts of all processes, as rows with `seed`, `index`, `tokens` and `num_forward_passes`, and the seconds of one device
        for each.

        Args:
            num_steps (`int`): The number of steps.
        """
        args, accelerator, options = self.args, self.accelerator, self._options()
        generate_samples(self.model, [0], 0, num_steps=1, **options)  # to warm up
        indices = list(range(accelerator.process_index, args.num_samples, accelerator.num_processes))
        options |= {"num_steps": num_steps, "return_dict_in_generate": True}
        options |= {} if args.timesteps is None else {"timesteps": args.timesteps}
        rows = []
        start = time.perf_counter()
        for seed in args.seeds if indices else []:
            output = generate_samples(self.model, indices, seed, **options)
            columns = (indices, output.sequences.tolist(), output.num_forward_passes.tolist())
            rows += [
                {"seed": seed, "index": index, "tokens": tokens, "num_forward_passes": num_passes}
                for index, tokens, num_passes in zip(*columns)
            ]
        seconds = time.perf_counter() - start  # the tokens have come to the host
        rows = sorted(gather_object(rows), key=lambda row: (row["seed"], row["index"]))
        return rows, sum(gather_object([seconds])) / len(rows)

    def score(self, texts: list[str], tokens: list[list[int]] | None) -> dict[str, Any]:
        """
        The figures of a row of the table.

        Args:
            texts (`list[str]`): What is scored.
            tokens (`list[list[int]]`, *optional*): The tokens of the model, for the entropy and the diversity.
        """
        result = self.metric.compute(
            predictions=texts,
            token_ids=tokens,
            model_id=self.args.scorer,
            batch_size=self.args.scorer_batch_size,
            max_length=self.args.max_length,
            dtype=self.args.scorer_dtype,
            device=str(self.accelerator.device),
        )
        intervals = confidence_intervals(result, self.args.bootstrap)
        return {name: value for name, value in result.items() if not isinstance(value, list)} | intervals

    def run(self) -> dict[str, Any] | None:
        """
        Generates, scores, and writes texts, table and plot.

        Returns:
            `dict[str, Any]`: what is written to `results.json`, in the main process.
        """
        args, model, guidance_model = self.args, self.model, self.guidance_model
        self.output.mkdir(parents=True, exist_ok=True)

        # First everything that the processes share, then the scoring, by the main process alone.
        samples = {}
        for num_steps in args.num_steps:
            rows, seconds = self.generate(num_steps)
            texts = decode(self.tokenizer, [row["tokens"] for row in rows], args)
            samples[num_steps] = rows, texts, seconds
            if self.accelerator.is_main_process:
                print(f"{num_steps} steps: {len(rows)} texts, {seconds:.4f} seconds of a device for each", flush=True)
                with open(self.output / f"samples_{num_steps}.jsonl", "w", encoding="utf-8") as file:
                    for row, text in zip(rows, texts):
                        file.write(json.dumps({"text": text, **row}, ensure_ascii=False) + "\n")
        model.cpu()
        if guidance_model is not None:
            guidance_model.cpu()
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return None

        # Every network takes a pass each step.
        networks = [model, guidance_model] if "guidance_model" in self.sampling else [model]
        num_networks = sum(len(network.embeddings) for network in networks)
        results = []
        for num_steps, (rows, texts, seconds) in samples.items():
            figures = self.score(texts, [row["tokens"] for row in rows])
            mean = sum(row["num_forward_passes"] for row in rows) / len(rows)
            passes = {"num_steps": num_steps, "num_forward_passes": mean * num_networks}
            results.append(passes | {"seconds_per_text": seconds} | figures)
        if self.reference is not None:
            results.append(self.score(*self.reference))
        evaluation = {
            "scorer": args.scorer,
            "num_samples": args.num_samples * len(args.seeds),
            "seeds": args.seeds,
            "sampling": self.sampling,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "results": [row for row in results if "num_steps" in row],
        }
        everything = {**evaluation, "arguments": vars(args), "results": results}
        report = f"{table(results)}\n\n{describe_evaluation(evaluation)}"
        (self.output / "results.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
        (self.output / "results.md").write_text(report + "\n", encoding="utf-8")
        plot(results, self.output / "results.png")
        print(f"\n{report}\n\nTexts, table and plot: {self.output}")
        if args.update_card:
            add_results(args.model, evaluation, revision=args.revision)
        return everything
