# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""`pipeline("text-generation")` for flow-based language models."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_flm import CUSTOM_PIPELINES


logger = logging.get_logger(__name__)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    argument: str = "texts",
    split_special_tokens: bool = True,
    **kwargs,
) -> list[list[int]]:
    """
    Tokenizes texts, without the special tokens that a tokenizer adds.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        texts (`list[str]`): The texts.
        argument (`str`, *optional*, defaults to `"texts"`): Name of the texts in error messages.
        split_special_tokens (`bool`, *optional*, defaults to `True`):
            Whether the names of special tokens in the texts, such as `[EOS]`, are tokenized as any other text.
        kwargs: Further arguments of the tokenizer.

    Returns:
        `list[list[int]]`: the tokens of each text.

    Raises:
        `ValueError`: for a text that is no valid Unicode, or that a tokenizer without a token for unknown text does not know.
    """
    kwargs = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False, **kwargs}
    try:
        return tokenizer(texts, **kwargs)["input_ids"]
    except Exception as error:  # of `tokenizers`, which has no types of its own
        for text in texts:
            check_unicode(text, argument)
        if "unk" not in str(error).lower():
            raise
        vocab = tokenizer.get_vocab()
        unknown = "".join(character for text in texts for character in text if character not in vocab)
        if max(map(len, vocab)) > 1 or not unknown:
            raise ValueError(
                f"`{argument}`: the tokenizer does not know some text, and has no `unk_token`: {error}"
            ) from error
        raise ValueError(
            f"`{argument}`: the tokenizer does not know {unknown[0]!r}, and has no `unk_token`: use only its {len(vocab)} "
            f"characters, {''.join(sorted(vocab))[:100]!r}."
        ) from error


def drops_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer leaves out characters that it does not know: byte-pair encoding without an unknown token, unless it is of bytes."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ == "BPE" and model.unk_token is None and not model.byte_fallback


def count_dropped(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """Counts the characters of texts, except spaces, that a tokenizer leaves out because it does not know them."""
    if not drops_unknown(tokenizer):
        return 0
    counts = Counter(chain.from_iterable(texts))
    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    candidates = [each for each in counts if not each.isspace() and backend.token_to_id(each) is None]
    if normalizer is not None:  # which may remove characters on purpose
        candidates = [each for each in candidates if normalizer.normalize_str(each).strip()]
    rows = tokenizer(candidates, add_special_tokens=False)["input_ids"] if candidates else []
    return sum(counts[each] for each, row in zip(candidates, rows) if not row)


def check_unicode(text: str, argument: str):
    """Raises a `ValueError` for a text with a lone surrogate, which is what Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{argument}`: {text[error.start]!r} at position {error.start} of {text[:40]!r} is no character: remove it, or decode "
            "the text with its own encoding."
        ) from error


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    bos_token_id: int | None,
    split_special_tokens: bool = True,
    argument: str = "text_inputs",
    warn: bool = True,
) -> dict[str, torch.LongTensor]:
    """
    Tokenizes prompts, without the special tokens that a tokenizer adds, since these may include an EOS token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        prompts (`list[str]`): The prompts.
        bos_token_id (`int`, *optional*): A token to put before every prompt.
        split_special_tokens (`bool`, *optional*, defaults to `True`): See [`encode_texts`].
        argument (`str`, *optional*, defaults to `"text_inputs"`): Name of the prompts in error messages.
        warn (`bool`, *optional*, defaults to `True`): Whether to warn about words that the tokenizer does not know.

    Returns:
        `dict[str, torch.LongTensor]`: `input_ids` and `attention_mask`, of shape `(num_prompts, prompt_length)`.
    """
    prefix = [] if bos_token_id is None else [bos_token_id]
    token_lists = encode_texts(tokenizer, prompts, argument, split_special_tokens)
    if warn:
        warn_of_unknown_words(tokenizer, prompts, token_lists)
    rows = [torch.tensor([*prefix, *tokens], dtype=torch.long) for tokens in token_lists]
    # Padded here, since the tokenizer may have no padding token
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase, prompts: list[str], token_lists: list[list[int]]):
    """Warns about prompts with unknown words: the samples would not show these words."""
    token, token_id = tokenizer.unk_token, tokenizer.unk_token_id
    if dropped := count_dropped(tokenizer, prompts):
        share = dropped / (dropped + sum(map(len, token_lists)))
        logger.warning(
            f"The tokenizer leaves out characters of the prompts that it does not know: {share:.1%} of the tokens."
        )
    with_unknown = [prompt for prompt, ids in zip(prompts, token_lists) if token_id in ids]
    if with_unknown:
        share = sum(ids.count(token_id) for ids in token_lists) / sum(map(len, token_lists))
        logger.warning(
            f"The tokenizer does not know some words of the prompts, {share:.1%} of the tokens, and replaces them by {token}: "
            f"{with_unknown[0]!r}" + (f", and {len(with_unknown) - 1} more." if len(with_unknown) > 1 else ".")
        )


class FLMPipeline(Pipeline):
    r"""
    Text generation pipeline: generates whole texts, or continues prompts.

    Args:
        kwargs:
            Arguments of [`~transformers.Pipeline`], which must include `model` and `tokenizer`, and default values for the
            parameters of a call.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-generation", model="path/to/model", trust_remote_code=True)
    >>> pipe(num_return_sequences=2, num_steps=1)
    [{'generated_text': '...'}, {'generated_text': '...'}]
    >>> pipe("The cat", num_steps=16)
    [{'generated_text': 'The cat ...'}]
    >>> for rows in pipe(KeyDataset(dataset, "prompt"), batch_size=32):
    ...     print(rows[0]["generated_text"])
    ```

    For a model in memory, use `FLMPipeline(model=model, tokenizer=tokenizer)`, or
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
            raise ValueError("`tokenizer` is needed to decode tokens: pass the model's tokenizer.")
        if self._batch_size is not None:  # of `generate`, not of the inputs
            self._forward_params["batch_size"] = self._batch_size
        # `pipeline()` puts classes into it, which cannot be saved as JSON.
        self.model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def __call__(self, text_inputs: str | Iterable[str] | None = None, **kwargs) -> list | Iterator[list]:
        """
        Generates texts.

        Args:
            text_inputs (`str`, `list[str]` or `Iterable[str]`, *optional*):
                Prompts. Generators and [`~transformers.pipelines.pt_utils.KeyDataset`] are read lazily, `batch_size` prompts
                at a time.
            num_return_sequences (`int`, *optional*, defaults to 1):
                Number of samples for each prompt; without prompts, the number of samples.
            add_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to put the `bos_token_id` of the model's generation configuration, if any, before every prompt. No
                other special tokens are added.
            split_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether the names of special tokens in prompts, such as `[EOS]`, are tokenized as any other text.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether to omit special tokens from the texts.
            return_tensors (`bool`, *optional*, defaults to `False`):
                Whether to return the tokens as well, as `"generated_token_ids"`.
            kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_steps` or `generator`.

        Returns:
            `list[dict[str, Any]]`: for each sample a dictionary with `"generated_text"`, the prompt included. For a list of
            prompts or a column of a dataset, a list of such lists; for lazily read prompts, an iterator over such lists.

        Raises:
            `ValueError`: if a parameter is unknown or has a value that cannot be used.
        """
        if text_inputs is None or isinstance(text_inputs, str):
            return self._generate([] if text_inputs is None else [text_inputs], **kwargs)[0]
        if isinstance(text_inputs, Sequence):  # a list, or a column of a dataset
            if len(text_inputs) == 0:
                raise ValueError("`text_inputs` must contain at least one text, got an empty list.")
            return self._generate(list(text_inputs), **kwargs)
        if isinstance(text_inputs, (Iterable, Dataset)) and not isinstance(text_inputs, Mapping):
            return self._generate_lazily(text_inputs, **kwargs)
        raise ValueError(
            f"`text_inputs` must be a text, a list of texts, a generator or a `KeyDataset`, got `{type(text_inputs).__name__}`."
        )

    def _generate_lazily(self, text_inputs: Iterable[str] | Dataset, **kwargs) -> Iterator[list[dict[str, Any]]]:
        """Yields the samples of each prompt; reads one batch of prompts at a time."""
        config = self.model.generation_config
        size = {**self._forward_params, **kwargs}.get("batch_size") or config.batch_size
        size = size or config._get_default_generation_params()["batch_size"]
        is_iterable = isinstance(text_inputs, Iterable)
        texts = iter(text_inputs) if is_iterable else (text_inputs[index] for index in range(len(text_inputs)))
        while prompts := list(islice(texts, size)):
            yield from self._generate(prompts, **kwargs)

    def _generate(self, prompts: list[str], **kwargs) -> list[list[dict[str, Any]]]:
        """Returns the samples of each prompt; without prompts, a single list."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"`text_inputs` must be a text or a list of texts, got {prompt!r}. For a dataset, pass a "
                    "column, `dataset['text']`. Chats are not supported."
                )
        preprocess_kwargs, generate_kwargs, decode_kwargs = self._sanitize_parameters(**kwargs)
        generate_kwargs = {**self._forward_params, **generate_kwargs}
        if prompts and "num_samples" in generate_kwargs:
            raise ValueError(
                "With prompts, pass `num_return_sequences`, the number of samples for each, instead of `num_samples`."
            )
        preprocess_kwargs = {**self._preprocess_params, **preprocess_kwargs}
        decode_kwargs = {**self._postprocess_params, **decode_kwargs}
        rows = self.run_single(prompts, preprocess_kwargs, generate_kwargs, decode_kwargs)
        size = len(rows) // max(len(prompts), 1)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _sanitize_parameters(
        self,
        add_special_tokens=None,
        split_special_tokens=None,
        skip_special_tokens=None,
        return_tensors=None,
        **generate_kwargs,
    ):
        preprocess = {"add_special_tokens": add_special_tokens, "split_special_tokens": split_special_tokens}
        decode = {"skip_special_tokens": skip_special_tokens, "return_tensors": return_tensors}
        preprocess, decode = (
            {name: value for name, value in each.items() if value is not None} for each in (preprocess, decode)
        )
        return preprocess, generate_kwargs, decode

    def preprocess(self, prompts, add_special_tokens=True, split_special_tokens=True):
        if not prompts:
            return {}
        bos_token_id = self.model.generation_config.bos_token_id if add_special_tokens else None
        return encode_prompts(self.tokenizer, prompts, bos_token_id, split_special_tokens)

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
