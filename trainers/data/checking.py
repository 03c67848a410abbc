# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of datasets before a training, and descriptions of datasets for its record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedConfig
from transformers.trainer_utils import has_length
from transformers.utils import logging

from modeling_flm.known_tokens_flm import lengths_up_to_eos, pad_token

from .collator import check_tokens


logger = logging.get_logger(__name__)

# Number of examples that are looked at, from the first on.
_NUM_EXAMPLES = 32


def check_dataset(name: str, dataset: Any, config: PreTrainedConfig):
    """
    Raises a `ValueError` if a model cannot learn from a dataset, judging by its columns, length and first examples.

    Args:
        name (`str`): Name of the argument, for messages.
        dataset ([`~datasets.Dataset`], or any other dataset): Examples. Only the first one of a stream of `datasets` is read.
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
                f"`{name}` needs a column `input_ids`, but has {', '.join(columns)}: make them with `pack_dataset` "
                f"or `pad_dataset(dataset, tokenizer, length={config.max_position_embeddings})`."
            )
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(
            f"`{name}` is a stream without examples: if its texts have fewer tokens than a block, pack them with a smaller `block_size`."
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
            input_ids = _tokens_of(name, example["input_ids"])
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


def _tokens_of(name: str, value: Any) -> torch.Tensor:
    """Returns the tokens of an example, or raises a `ValueError` if these are none."""
    try:
        tokens = torch.as_tensor(value)
    except (TypeError, ValueError):  # texts
        tokens = torch.empty(0)
    if tokens.dim() != 1 or len(tokens) == 0 or tokens.is_floating_point():
        shown = repr(value)
        raise ValueError(
            f"`input_ids` of `{name}` must be lists of one or more tokens, got {shown[:60]}{'...' * (len(shown) > 60)}: make them "
            "with `pack_dataset` or `pad_dataset`."
        )
    return tokens


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


@dataclass
class TextBoundaries:
    """
    How training examples mark texts.

    Args:
        begin_with_bos (`bool`): Whether any example begins with the BOS token.
        end_with_padding (`bool`):
            Whether all examples end at their first EOS token, some of them followed by padding, as [`pad_dataset`] makes them.
    """

    begin_with_bos: bool
    end_with_padding: bool

    def apply(self, config: GenerationConfig):
        """
        Adapts a generation configuration: removes the BOS token if examples do not begin with it, so that the pipeline does not put it
        before prompts, and ends texts at EOS if theirs do, unless `pad_after_eos` is set.
        """
        if not self.begin_with_bos:
            config.bos_token_id = None
        if self.end_with_padding and config.pad_after_eos is None:
            config.pad_after_eos = True


def find_text_boundaries(
    dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], config: GenerationConfig
) -> TextBoundaries | None:
    """
    Finds how the first training examples mark the beginnings and ends of texts, and logs what generation makes of it. Warns
    about examples of different lengths, whose lengths a model does not learn.

    Args:
        dataset ([`~datasets.Dataset`], or any other dataset): Training examples.
        collate (`Callable`): Data collator, which makes a batch with `input_ids`.
        config ([`FLMGenerationConfig`]): The special tokens.

    Returns:
        [`TextBoundaries`], or `None` if examples cannot be read before the training.
    """
    examples = _first_examples(dataset)
    if not examples:
        logger.warning(
            "It is unknown where texts begin and end in the training examples, because the dataset may allow only one pass: "
            "`generation_config` stays as it is."
        )
        return None
    batch = collate(examples)
    sequences, bos_token_id = batch["input_ids"], config.bos_token_id
    if "attention_mask" in batch and batch["attention_mask"].sum(dim=1).unique().numel() > 1:
        logger.warning(
            "Training examples have different lengths, which the model does not learn, because the loss and `attention_mask` leave "
            "out padding: all generated texts will have full length. To learn where texts end, make examples with "
            "`pad_dataset(dataset, tokenizer, length)`."
        )
    num_begin = 0 if bos_token_id is None else int((sequences[:, 0] == bos_token_id).sum())
    boundaries = TextBoundaries(num_begin > 0, _end_with_padding(sequences, config))
    if bos_token_id is not None:
        count = f"{num_begin} of the first {len(examples)}" if num_begin else f"None of the first {len(examples)}"
        effect = (
            "stays, and the pipeline puts it" if num_begin else "is set to `None`, and the pipeline does not put it"
        )
        logger.log(
            logging.INFO if num_begin or boundaries.end_with_padding else logging.WARNING,
            f"{count} training examples begin with the BOS token ({bos_token_id}): `generation_config.bos_token_id` {effect} "
            "before prompts.",
        )
    if boundaries.end_with_padding and not config.pad_after_eos:
        logger.info(
            "Training examples are texts that end with EOS and padding: `generation_config.pad_after_eos` is set to `True`, and "
            "generated texts end at their first EOS token."
        )
    return boundaries


def _end_with_padding(sequences: torch.LongTensor, config: GenerationConfig) -> bool:
    """Returns whether all sequences end at their first EOS token, and some of them have padding after it."""
    if config.eos_token_id is None:
        return False
    positions = torch.arange(sequences.shape[1])
    lengths = lengths_up_to_eos(sequences, config.eos_token_id, config.bos_token_id)[:, None]
    is_after = positions >= lengths
    eos = torch.as_tensor(config.eos_token_id)
    ends = torch.isin(sequences.gather(1, lengths - 1), eos).all()
    return bool(is_after.any() and ends and (sequences[is_after] == pad_token(config)).all())


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
