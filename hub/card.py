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
"""The model card: a README with the metadata of the Hub, made from what is in a model's folder."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel


TEMPLATES = Path(__file__).parent / "templates"

# A card with this line was generated, and is generated anew. Without it, it is somebody's own.
MARKER = "Generated: publishing again overwrites this file. Remove this line to keep your changes."

TRAINING_NAME = "training.json"  # written by the trainers
EVALUATION_NAME = "evaluation.json"  # scorer, num_samples, results: [{num_steps, gen_ppl, entropy}, ...]
DATA_SETTINGS_NAME = "data_settings.json"  # written by the training scripts


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of a folder, empty where there is none."""
    path = Path(folder) / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_hub_name(name: str | None) -> bool:
    """Whether `name` can be that of a repository, and is not of something on this machine."""
    return bool(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def build_card(
    folder: str | Path,
    repo_id: str,
    model: PreTrainedModel,
    samples: list[str],
    license: str = "apache-2.0",
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    base_model: str | None = None,
    tags: str | list[str] | None = None,
) -> ModelCard:
    """
    Makes the card of a model from what is known of it.

    Args:
        folder (`str` or `Path`):
            The model's folder. Its `training.json`, `data_settings.json` and `evaluation.json` are used where they are
            there.
        repo_id (`str`):
            The name of the repository, for the code that shows how to use it.
        model ([`~transformers.PreTrainedModel`]):
            The model.
        samples (`list[str]`):
            Texts of the model.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            The licence of the weights.
        language (`str` or `list[str]`, *optional*):
            The languages of the texts, as codes.
        datasets (`str` or `list[str]`, *optional*):
            The names of the datasets that the model was trained on. That of the training scripts unless given.
        base_model (`str`, *optional*):
            The name of the model that this one was distilled from. The teacher, if it has such a name, unless given.
        tags (`str` or `list[str]`, *optional*):
            Further tags.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    training = read_json(folder, TRAINING_NAME)
    evaluation = read_json(folder, EVALUATION_NAME)
    dataset_name = read_json(folder, DATA_SETTINGS_NAME).get("dataset_name")
    if datasets is None and is_hub_name(dataset_name):
        datasets = dataset_name
    if base_model is None:
        base_model = training.get("teacher")
    as_list = lambda x: [] if x is None else [x] if isinstance(x, str) else list(x)  # noqa: E731
    datasets, config, name = as_list(datasets), model.config, repo_id.split("/")[-1]
    family = "flm" if config.model_type == "flm" else "fmlm"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=datasets or None,
        base_model=base_model,
        tags=[family, "flow-matching", "diffusion-language-model", "custom_code", "arxiv:2602.16813", *as_list(tags)],
        model_name=name,
        eval_results=eval_results(evaluation) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        marker=MARKER,
        name=name,
        repo_id=repo_id,
        model_type=config.model_type,
        config=config,
        num_parameters=model.num_parameters(),
        num_steps=default_num_steps(model),
        transformers_requirement="5.20 or newer",
        samples=samples,
        evaluation=evaluation,
        results=evaluation.get("results", []),
        training=training,
        base_model=base_model,
        datasets=datasets,
        license=license,
    )


def default_num_steps(model: PreTrainedModel) -> int:
    """The number of steps that `generate()` takes unless told otherwise."""
    return model.generation_config.num_steps or model.generation_config._get_default_generation_params()["num_steps"]


def eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """
    Generative perplexity and entropy at each number of steps, for the `model-index`.

    Args:
        evaluation (`dict[str, Any]`):
            With `scorer`, `num_samples` and `results`, a list of dictionaries with `num_steps`, `gen_ppl` and `entropy`.

    Returns:
        `list[EvalResult]`
    """
    metrics = {"gen_ppl": ("perplexity", "Generative perplexity"), "entropy": ("entropy", "Unigram entropy (nats)")}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Unconditional text generation",
            dataset_type="generated",
            dataset_name=f"{evaluation['num_samples']} generated texts",
            metric_type=metric_type,
            metric_name=f"{metric_name}, {row['num_steps']} step{'s' if row['num_steps'] > 1 else ''}",
            metric_value=row[key],
            metric_args={"num_steps": row["num_steps"], "scorer": evaluation["scorer"]},
        )
        for row in evaluation.get("results", [])
        for key, (metric_type, metric_name) in metrics.items()
    ]
