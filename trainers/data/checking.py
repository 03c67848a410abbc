# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What trainers cannot learn from, said before the training, and what a dataset is, for the record of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .collator import check_tokens


logger = logging.get_logger(__name__)

# How many of the first examples are looked at.
_NUM_EXAMPLES = 32


def check_dataset(name: str, dataset: Any, config: PreTrainedConfig):
    """
    Raises a `ValueError` where a dataset is not one of examples for a model, as far as its columns, its length and its first
    examples tell.

    Args:
        name (`str`): The argument that it is.
        dataset ([`~datasets.Dataset`], or any other dataset): The examples, which nothing is read of if it is a stream.
        config ([`~transformers.PreTrainedConfig`]): The configuration of the model.
    """
    if isinstance(dataset, dict):  # also a `DatasetDict`
        raise ValueError(
            f"`{name}` has the splits {', '.join(dataset)}: pass one, such as `dataset[{next(iter(dataset))!r}]`."
        )
    if isinstance(dataset, (Dataset, IterableDataset)):
        columns = dataset.column_names  # which a stream may not know
        if columns is not None and "input_ids" not in columns:
            raise ValueError(
                f"`{name}` needs a column `input_ids`, and has {', '.join(columns)}: pack texts with `pack_dataset(dataset, "
                f"tokenizer, block_size={config.max_position_embeddings})`."
            )
    if not has_length(dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return  # which can perhaps be read only once
    num_labels = 0
    for index in range(min(_NUM_EXAMPLES, len(dataset))):
        example = dataset[index]
        if isinstance(example, Mapping) and "input_ids" in example:
            input_ids = torch.as_tensor(example["input_ids"])
            check_length(f"Texts of `{name}`", len(input_ids), config)
            check_tokens(f"Texts of `{name}`", input_ids, config.vocab_size)
            if "labels" in example:
                labels = torch.as_tensor(example["labels"])
                num_labels += (labels != -100).sum().item()
                if labels.shape != input_ids.shape or ((labels != input_ids) & (labels != -100)).any():
                    raise ValueError(
                        f"`labels` of `{name}` must be its `input_ids`, or -100 where a token is not to be learned; or leave them "
                        "out to learn all tokens."
                    )
            else:
                num_labels += 1
    if num_labels == 0:
        raise ValueError(
            f"`labels` of `{name}` are all -100, so that there is nothing to learn, in the first examples."
        )


def check_datasets(train_dataset: Any, eval_dataset: Any, config: PreTrainedConfig):
    """Raises a `ValueError` if a model cannot learn from the datasets of a trainer, see [`check_dataset`]."""
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        del datasets["eval_dataset"]
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    for name, dataset in datasets.items():
        if dataset is not None:
            check_dataset(name, dataset, config)


def check_length(name: str, length: int, config: PreTrainedConfig):
    """Raises a `ValueError` where texts are longer than a model will ever write."""
    longest = config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"{name} have {length} tokens, but the model was made for at most {longest}: pack them with "
            f"`block_size={longest}`, or build the model with `max_position_embeddings={length}`."
        )


def begins_with_bos_token(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], bos_token_id: int) -> bool:
    """
    Whether any of the first training texts begins with the BOS token, or it is not known. The logs have the answer.

    Args:
        dataset ([`~datasets.Dataset`], or any other dataset): The training examples.
        collate (`Callable`): Makes a batch with `input_ids` of examples.
        bos_token_id (`int`): The token.
    """
    examples = _first_examples(dataset)
    if not examples:
        logger.warning(
            f"Whether training texts begin with the BOS token ({bos_token_id}) is not known, as they cannot be looked at "
            "before the training: `generation_config.bos_token_id` stays, and the pipeline begins prompts with it."
        )
        return True
    count = int((collate(examples)["input_ids"][:, 0] == bos_token_id).sum())
    if count == 0:
        logger.warning(
            f"None of the first {len(examples)} training texts begins with the BOS token ({bos_token_id}): "
            "`generation_config.bos_token_id` is set to `None`, and the pipeline does not begin prompts with it."
        )
    else:
        logger.info(
            f"{count} of the first {len(examples)} training texts begin with the BOS token ({bos_token_id}): "
            "`generation_config.bos_token_id` stays, and the pipeline begins prompts with it."
        )
    return count > 0


def _first_examples(dataset: Any) -> list[Any] | None:
    """The first examples of a dataset, or `None` where looking at them could take them from the training."""
    if isinstance(dataset, IterableDataset):
        return list(dataset.take(_NUM_EXAMPLES))  # the training starts a reading of its own
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        return None  # which can perhaps be read only once
    return [dataset[index] for index in range(min(_NUM_EXAMPLES, len(dataset)))]


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    What is known of a dataset.

    Args:
        dataset ([`~datasets.Dataset`], or any other dataset): The examples, or `None`.

    Returns:
        `dict[str, Any]`: `num_examples`, if there is a number, and `source`, what `dataset.info` says: its description, which
        [`load_texts`] makes the name of the dataset or of the file, or the name of a dataset that is not just a file.
    """
    described = {"num_examples": len(dataset)} if has_length(dataset) else {}
    if isinstance(dataset, (Dataset, IterableDataset)):
        info = dataset.info
        name = info.dataset_name if info.dataset_name != info.builder_name else None
        if source := " ".join((info.description or name or "").split()):
            described["source"] = source[:300]
    return described
