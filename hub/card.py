# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Model cards: a README with metadata for the Hub, made from the records in a model folder."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, metadata_update
from transformers import PreTrainedModel
from transformers.utils import logging
from yaml import YAMLError

from .records import (
    DATA_SETTINGS_NAME,
    EVALUATION_NAME,
    ONNX_FILES,
    ONNX_FOLDER,
    TRAINING_NAME,
    clean_sampling,
    is_hub_name,
    public_name,
    to_json,
)


logger = logging.get_logger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

# Marks a generated card, which publishing replaces. A card without this line is the user's own.
MARKER = "Generated: publishing again overwrites this file. Remove this line to keep your changes."


def _as_list(values: str | list[str] | None) -> list[str]:
    return [] if values is None else [values] if isinstance(values, str) else list(values)


def _as_block(text: str) -> str:
    """Formats a text as a code block with a fence that the text does not contain, and without control characters."""
    text = "".join(character for character in text if character in "\n\t" or character.isprintable())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _as_cell(value: Any) -> str:
    """Formats a value as a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def build_card(
    records: dict[str, dict[str, Any]],
    repo_id: str,
    model: PreTrainedModel,
    samples: list[str],
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    base_model: str | None = None,
    tags: str | list[str] | None = None,
    adapter: dict[str, Any] | None = None,
    onnx: Sequence[str] = (),
) -> ModelCard:
    """
    Builds the card of a model from its records.

    Args:
        records (`dict[str, dict[str, Any]]`):
            Records of the model, from [`~modeling_flm.hub.records.read_records`].
        repo_id (`str`):
            Name of the repository, for the usage examples.
        model ([`~transformers.PreTrainedModel`]):
            The model.
        samples (`list[str]`):
            Samples to show. If empty, the card has no samples.
        license (`str`, *optional*):
            License of the weights, as an identifier of the Hub such as `"mit"`. By default the card names none.
        language (`str` or `list[str]`, *optional*):
            Language codes of the texts.
        datasets (`str` or `list[str]`, *optional*):
            Names of the training datasets. Defaults to the dataset in the records.
        base_model (`str`, *optional*):
            Name of the model that this one was distilled or adapted from. Defaults to the teacher, if it is on the Hub.
        tags (`str` or `list[str]`, *optional*):
            More tags.
        adapter (`dict[str, Any]`, *optional*):
            The `adapter_config.json` of an adapter that was merged into the model.
        onnx (`Sequence[str]`, *optional*, defaults to `()`):
            Precisions of the ONNX files in the repository.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    training, evaluation = records.get(TRAINING_NAME, {}), records.get(EVALUATION_NAME, {})
    source = training.get("data", {}).get("source")
    source = None if source is None else _as_cell(source)
    if datasets is None:
        datasets = records.get(DATA_SETTINGS_NAME, {}).get("dataset_name")
    if datasets is None and source is not None and "/" in source and is_hub_name(source):
        datasets = source
    if base_model is None:
        base_model = training.get("teacher")
    datasets, config, name = _as_list(datasets), model.config, repo_id.split("/")[-1]
    family = "flm" if config.model_type == "flm" else "fmlm"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=datasets or None,
        base_model=base_model,
        tags=[
            family,
            "flow-matching",
            "diffusion-language-model",
            "custom_code",
            "arxiv:2602.16813",
            *["onnx"] * bool(onnx),
            *_as_list(tags),
        ],
        model_name=name,
        eval_results=eval_results(evaluation) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        marker=MARKER,
        name=name,
        repo_id=repo_id,
        config=config,
        num_parameters=model.num_parameters(),
        num_steps=default_num_steps(model),
        blocks=list(map(_as_block, samples)),
        evaluation=evaluation,
        training=training,
        data=None if datasets else source,
        num_examples=training.get("data", {}).get("num_examples"),
        records=sorted(records),
        arguments={name: _as_cell(value) for name, value in training.get("arguments", {}).items()},
        base_model=base_model,
        datasets=datasets,
        license=license,
        adapter=None if adapter is None else _describe_adapter(adapter),
        onnx=[(f"{ONNX_FOLDER}/{ONNX_FILES[precision]}", precision) for precision in onnx],
    )


def _describe_adapter(adapter: dict[str, Any]) -> str:
    """Describes an adapter, and its base model if that is on the Hub."""
    peft_type = _as_cell(adapter.get("peft_type") or "peft")
    rank, base = adapter.get("r"), adapter.get("base_model_name_or_path")
    described = f"an adapter ({peft_type}{f' of rank {rank}' if isinstance(rank, int) else ''})"
    return described + (f" of [`{base}`](https://huggingface.co/{base})" if is_hub_name(base) else "")


def missing_metadata(card: ModelCard, records: dict[str, dict[str, Any]]) -> list[str]:
    """Arguments that would fill in missing card metadata, with a description of each."""
    missing = []
    if card.data.license is None:
        missing.append("`license`, such as 'mit': without a license others may not use the weights")
    training = records.get(TRAINING_NAME, {})
    if training.get("teacher_class") is not None and card.data.base_model is None:
        missing.append("`base_model`, the name of the model that this one was distilled from")
    if not card.data.datasets and "source" not in training.get("data", {}):
        missing.append("`datasets`, the names of the datasets that the model was trained on")
    return missing


def default_num_steps(model: PreTrainedModel) -> int:
    """Default number of steps of `generate()`."""
    config = model.generation_config
    return config.num_steps or config._get_default_generation_params()["num_steps"]


def eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """
    Builds the `model-index` entries of generative perplexity and entropy at each number of steps.

    Args:
        evaluation (`dict[str, Any]`):
            A dictionary with `scorer`, `num_samples`, `results`, a list of dictionaries with `num_steps`, `gen_ppl` and
            `entropy`, and `sampling`, a dictionary of generation and scoring settings such as `gamma` and `protocol`.

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
            metric_args={
                "num_steps": row["num_steps"],
                "scorer": public_name(evaluation["scorer"]),
                **clean_sampling(evaluation),
            },
        )
        for row in evaluation.get("results", [])
        for key, (metric_type, metric_name) in metrics.items()
    ]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def check_results_can_be_added(model: str):
    """Raises an `OSError` or `ValueError` if [`add_results`] needs a token of the Hub, or files that cannot be read."""
    if not Path(model).is_dir():
        HfApi().whoami()
        return
    for name, read in ((EVALUATION_NAME, json.loads), ("README.md", ModelCard)):
        path = Path(model, name)
        if path.is_file():
            try:
                read(path.read_text(encoding="utf-8"))
            except (ValueError, YAMLError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error


def add_results(model: str, evaluation: dict[str, Any], revision: str = "main"):
    """
    Adds the results of an evaluation to a model. Numbers of steps without a score, because all texts are empty, are left out.

    Args:
        model (`str`):
            Model folder, where the results are stored as a record, which publishing adds to the card; or name of a
            repository, whose card is updated.
        evaluation (`dict[str, Any]`): Results as in [`eval_results`], with `seeds`.
        revision (`str`, *optional*, defaults to `"main"`): Branch of the repository.
    """
    scored = [row for row in evaluation["results"] if all(_is_finite(row[name]) for name in ("gen_ppl", "entropy"))]
    if len(scored) < len(evaluation["results"]):
        logger.warning(
            f"{len(evaluation['results']) - len(scored)} rows without a score are not stored with {model}: their texts are empty."
        )
    if not scored:
        return
    evaluation = {**evaluation, "results": scored}
    folder, results = Path(model), eval_results(evaluation)
    name = model.rstrip("/").split("/")[-1]
    if not folder.is_dir():
        index = ModelCardData(model_name=name, eval_results=results).to_dict()["model-index"]
        metadata_update(model, {"model-index": index}, overwrite=True, revision=revision)
        return
    path = folder / EVALUATION_NAME
    if path.is_file():  # keep other numbers of steps that were measured in the same way
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(old.get(key) == evaluation[key] for key in ("scorer", "num_samples", "seeds", "sampling")):
            rows = {row["num_steps"]: row for row in [*old["results"], *evaluation["results"]]}
            evaluation = {**evaluation, "results": [rows[num_steps] for num_steps in sorted(rows)]}
    path.write_text(to_json(evaluation, indent=2) + "\n", encoding="utf-8")
    if (folder / "README.md").is_file():
        card = ModelCard.load(folder / "README.md")
        others = card.data.eval_results or []
        others = [old for old in others if not any(old.is_equal_except_value(new) for new in results)]
        card.data.model_name, card.data.eval_results = card.data.model_name or name, [*others, *results]
        card.save(folder / "README.md")
