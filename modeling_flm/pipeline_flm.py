# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""`pipeline("text-generation")` for flow-based language models."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_flm import CUSTOM_PIPELINES


logger = logging.get_logger(__name__)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], bos_token_id: int | None
) -> dict[str, torch.LongTensor]:
    """
    The `input_ids` and the `attention_mask` of texts to continue. What a tokenizer adds is left out, as it may end texts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        prompts (`list[str]`): How texts begin.
        bos_token_id (`int`, *optional*): The token to begin them with, if any.

    Returns:
        `dict[str, torch.LongTensor]`: both of shape `(num_prompts, prompt_length)`.
    """
    begin = [] if bos_token_id is None else [bos_token_id]
    token_lists = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    _warn_of_unknown_words(tokenizer, prompts, token_lists)
    rows = [torch.tensor([*begin, *tokens], dtype=torch.long) for tokens in token_lists]
    # Not by the tokenizer, which may have no padding token
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def _warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase, prompts: list[str], token_lists: list[list[int]]):
    """Warns of prompts with words that are lost, as texts would seem not to begin with these prompts."""
    token, token_id = tokenizer.unk_token, tokenizer.unk_token_id
    if token_id is None:
        return
    with_unknown = [prompt for prompt, ids in zip(prompts, token_lists) if token_id in ids and token not in prompt]
    if with_unknown:
        logger.warning(
            f"Prompts have words that the tokenizer does not know, and that become {token}: {with_unknown[0]!r}"
            + (f", and {len(with_unknown) - 1} more." if len(with_unknown) > 1 else ".")
        )


class FLMPipeline(Pipeline):
    r"""
    Texts in one call: whole ones, or continued prompts.

    Args:
        kwargs: As for [`~transformers.Pipeline`], of which `model` and `tokenizer` are needed; and parameters of `generate`
            and of a call to keep as defaults.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-generation", model="path/to/model", trust_remote_code=True)
    >>> pipe(num_samples=2, num_steps=1)
    [{'generated_text': '...'}, {'generated_text': '...'}]
    >>> pipe("The cat", num_steps=16)
    [{'generated_text': 'The cat ...'}]
    >>> for rows in pipe(KeyDataset(dataset, "prompt"), batch_size=32):
    ...     print(rows[0]["generated_text"])
    ```

    A model that is loaded already: `FLMPipeline(model=model, tokenizer=tokenizer)`, or
    `pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=FLMPipeline)`.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer is None:
            raise ValueError("`tokenizer` is needed to turn tokens into texts: pass that of the model.")
        if self._batch_size is not None:  # here it is not about inputs
            self._forward_params["batch_size"] = self._batch_size
        # `pipeline()` has put classes into it, with which the configuration could not be saved.
        self.model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def __call__(self, text_inputs: str | Iterable[str] | None = None, **kwargs) -> list | Iterator[list]:
        """
        Generates texts.

        Args:
            text_inputs (`str`, `list[str]` or `Iterable[str]`, *optional*):
                How texts begin. Generators and [`~transformers.pipelines.pt_utils.KeyDataset`] are read while texts are
                generated, `batch_size` of them at a time.
            add_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether prompts begin with the `bos_token_id` of the model's generation configuration, if it has one. What
                the tokenizer adds otherwise is left out, as it may end texts.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether to leave special tokens out of the texts.
            return_tensors (`bool`, *optional*, defaults to `False`):
                Whether to return the tokens as well, as `"generated_token_ids"`.
            kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_samples` (for each prompt), `num_steps` or
                `generator`.

        Returns:
            `list[dict[str, Any]]`: for each of `num_samples` texts a dictionary with `"generated_text"`. For a list of prompts,
            or a column of a dataset, a list of such lists; for what is read while generating an iterator of them.

        Raises:
            `ValueError`: if a parameter is unknown or has a value that cannot be used.
        """
        if text_inputs is None or isinstance(text_inputs, str):
            return self._generate([] if text_inputs is None else [text_inputs], **kwargs)[0]
        if isinstance(text_inputs, Sequence):  # a list, or a column of a dataset
            if len(text_inputs) == 0:
                raise ValueError("`text_inputs` must have at least one text, got none.")
            return self._generate(list(text_inputs), **kwargs)
        if isinstance(text_inputs, (Iterable, Dataset)) and not isinstance(text_inputs, Mapping):
            return self._generate_lazily(text_inputs, **kwargs)
        raise ValueError(
            f"`text_inputs` must be a text, a list of texts, a generator or a `KeyDataset`, got `{type(text_inputs).__name__}`."
        )

    def _generate_lazily(self, text_inputs: Iterable[str] | Dataset, **kwargs) -> Iterator[list[dict[str, Any]]]:
        """The texts of one prompt after the other, of which as many as make a batch are read at a time."""
        config = self.model.generation_config
        size = {**self._forward_params, **kwargs}.get("batch_size") or config.batch_size
        size = size or config._get_default_generation_params()["batch_size"]
        is_iterable = isinstance(text_inputs, Iterable)
        texts = iter(text_inputs) if is_iterable else (text_inputs[index] for index in range(len(text_inputs)))
        while prompts := list(islice(texts, size)):
            yield from self._generate(prompts, **kwargs)

    def _generate(self, prompts: list[str], **kwargs) -> list[list[dict[str, Any]]]:
        """The texts of each prompt; without prompts, one list."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"`text_inputs` must be a text or a list of texts, got {prompt!r}. Of a dataset pass a column, "
                    "`dataset['text']`; chats are not supported."
                )
        preprocess_kwargs, generate_kwargs, decode_kwargs = self._sanitize_parameters(**kwargs)
        generate_kwargs = {**self._forward_params, **generate_kwargs}
        num_samples = generate_kwargs.get("num_samples")
        if num_samples is None and "generation_config" in generate_kwargs:
            num_samples = getattr(generate_kwargs["generation_config"], "num_samples", None)
        if prompts and isinstance(num_samples, int):
            generate_kwargs["num_samples"] = num_samples * len(prompts)
        preprocess_kwargs = {**self._preprocess_params, **preprocess_kwargs}
        decode_kwargs = {**self._postprocess_params, **decode_kwargs}
        rows = self.run_single(prompts, preprocess_kwargs, generate_kwargs, decode_kwargs)
        size = len(rows) // max(len(prompts), 1)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _sanitize_parameters(
        self, add_special_tokens=None, skip_special_tokens=None, return_tensors=None, **generate_kwargs
    ):
        preprocess = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        decode = {"skip_special_tokens": skip_special_tokens, "return_tensors": return_tensors}
        return preprocess, generate_kwargs, {name: value for name, value in decode.items() if value is not None}

    def preprocess(self, prompts, add_special_tokens=True):
        if not prompts:
            return {}
        return encode_prompts(
            self.tokenizer, prompts, self.model.generation_config.bos_token_id if add_special_tokens else None
        )

    def _forward(self, model_inputs, **generate_kwargs):
        return self.model.generate(**{**generate_kwargs, **model_inputs, "return_dict_in_generate": True})

    def postprocess(self, model_outputs, skip_special_tokens=True, return_tensors=False):
        tokens = model_outputs.sequences
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=skip_special_tokens)
        rows = [{"generated_text": text} for text in texts]
        if return_tensors:
            for row, row_tokens in zip(rows, tokens.tolist()):
                row["generated_token_ids"] = row_tokens
        return rows


__all__ = ["FLMPipeline"]
