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
"""`pipeline("text-generation")` for flow-based language models."""

import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Pipeline, PreTrainedTokenizerBase


# In the configuration, for `pipeline()` to find this file beside the model.
CUSTOM_PIPELINES = {"text-generation": {"impl": "pipeline_flm.FLMPipeline", "pt": ["AutoModel"]}}


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
    rows = [torch.tensor([*begin, *tokens], dtype=torch.long) for tokens in token_lists]
    # Not by the tokenizer, which may have no padding token
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


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
    ```
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

    def __call__(self, text_inputs: str | list[str] | None = None, **kwargs) -> list:
        """
        Generates texts.

        Args:
            text_inputs (`str` or `list[str]`, *optional*):
                How texts begin.
            add_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether prompts begin with the `bos_token_id` of the model's generation configuration, if it has one. What
                the tokenizer adds otherwise is left out, as it may end texts.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether to leave special tokens out of the texts.
            return_tensors (`bool`, *optional*, defaults to `False`):
                Whether to return the tokens as well, as `"generated_token_ids"`.
            kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_samples` (for each prompt), `num_steps` or
                `generator`.

        Returns:
            `list[dict[str, Any]]`: for each of `num_samples` texts a dictionary with `"generated_text"`. For a list of prompts
            a list of such lists.

        Raises:
            `ValueError`: if a parameter is unknown or has a value that cannot be used.
        """
        is_list = isinstance(text_inputs, (list, tuple))
        prompts = list(text_inputs) if is_list else [] if text_inputs is None else [text_inputs]
        if (is_list and not prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"`text_inputs` must be a text or a list of texts, got {text_inputs!r}.")
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
        return [rows[start : start + size] for start in range(0, len(rows), size)] if is_list else rows

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
