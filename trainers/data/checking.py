# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of datasets before a training, and descriptions of datasets for its record."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .collator import check_tokens


logger = logging.get_logger(__name__)

# Number of examples that are looked at, from the first on.
_NUM_EXAMPLES = 32


def check_dataset(name: str, dataset: Any, config: PreTrainedConfig):
    """
    Raises a `ValueError` if a model cannot learn from a dataset, judging by its columns, length and first examples.

    Args:
        name (`str`): Name of the argument, for messages.
        dataset ([`~datasets.Dataset`], or any other dataset): Examples. A stream is not read.
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model.
    """
    if isinstance(dataset, dict):  # also a `DatasetDict`
        raise ValueError(
            f"`{name}` has the splits {', '.join(dataset)}: pass one, such as `dataset[{next(iter(dataset))!r}]`."
        )
    if isinstance(dataset, (Dataset, IterableDataset)):
        columns = dataset.column_names  # `None` for some streams
        if columns is not None and "input_ids" not in columns:
            raise ValueError(
                f"`{name}` needs a column `input_ids`, but has {', '.join(columns)}: pack texts with `pack_dataset(dataset, "
                f"tokenizer, block_size={config.max_position_embeddings})`."
            )
    if not has_length(dataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return  # it may allow only one pass
    num_labels = 0
    for index in range(min(_NUM_EXAMPLES, len(dataset))):
        example = dataset[index]
        if isinstance(example, Mapping) and "input_ids" in example:
            input_ids = torch.as_tensor(example["input_ids"])
            check_length(f"Examples of `{name}`", len(input_ids), config.max_position_embeddings)
            check_tokens(f"Examples of `{name}`", input_ids, config.vocab_size)
            if "labels" in example:
                labels = torch.as_tensor(example["labels"])
                num_labels += (labels != -100).sum().item()
                if labels.shape != input_ids.shape or ((labels != input_ids) & (labels != -100)).any():
                    raise ValueError(
                        f"`labels` of `{name}` must equal `input_ids`, or be -100 for tokens that are not learned. To learn all "
                        "tokens, leave them out."
                    )
            else:
                num_labels += 1
    if num_labels == 0:
        raise ValueError(
            f"`labels` of `{name}` are all -100 in the first examples: give tokens to learn their ids as labels."
        )


def check_length(name: str, length: int, max_length: int):
    """Raises a `ValueError` if examples, called `name` in the message, are longer than the model's maximum length."""
    if length > max_length:
        raise ValueError(
            f"{name} have {length} tokens, but the model was made for at most {max_length}: pack them with "
            f"`block_size={max_length}`, or build the model with `max_position_embeddings={length}`."
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


def begins_with_bos_token(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], bos_token_id: int) -> bool:
    """
    Returns whether any of the first training examples begins with the BOS token, and logs it. `True` if they cannot be read
    before the training.

    Args:
        dataset ([`~datasets.Dataset`], or any other dataset): Training examples.
        collate (`Callable`): Data collator, which makes a batch with `input_ids`.
        bos_token_id (`int`): Id of the BOS token.
    """
    examples = _first_examples(dataset)
    if not examples:
        logger.warning(
            f"It is unknown whether training examples begin with the BOS token ({bos_token_id}), because the dataset may allow only "
            "one pass: `generation_config.bos_token_id` stays, and the pipeline puts it before prompts."
        )
        return True
    count = int((collate(examples)["input_ids"][:, 0] == bos_token_id).sum())
    if count == 0:
        logger.warning(
            f"None of the first {len(examples)} training examples begins with the BOS token ({bos_token_id}): "
            "`generation_config.bos_token_id` is set to `None`, and the pipeline does not put it before prompts."
        )
    else:
        logger.info(
            f"{count} of the first {len(examples)} training examples begin with the BOS token ({bos_token_id}): "
            "`generation_config.bos_token_id` stays, and the pipeline puts it before prompts."
        )
    return count > 0


def _first_examples(dataset: Any) -> list[Any] | None:
    """Returns the first examples of a dataset, or `None` if reading them could take them from the training."""
    if isinstance(dataset, IterableDataset):
        return list(dataset.take(_NUM_EXAMPLES))  # the training starts another pass
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        return None  # it may allow only one pass
    return [dataset[index] for index in range(min(_NUM_EXAMPLES, len(dataset)))]


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """
    Describes a dataset for the record of a training.

    Args:
        dataset ([`~datasets.Dataset`], or any other dataset): Examples, or `None`.

    Returns:
        `dict[str, Any]`: `num_examples`, if it is known, and `source`, if `dataset.info` has a description (which [`load_texts`]
        sets to the name of the dataset or file) or the name of a Hub dataset.
    """
    described = {"num_examples": len(dataset)} if has_length(dataset) else {}
    if isinstance(dataset, (Dataset, IterableDataset)):
        info = dataset.info
        name = info.dataset_name if info.dataset_name != info.builder_name else None
        if source := " ".join((info.description or name or "").split()):
            described["source"] = source[:300]
    return described
