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
from typing import Any

from transformers import Pipeline


# In the configuration, for `pipeline()` to find this file beside the model.
CUSTOM_PIPELINES = {"text-generation": {"impl": "pipeline_flm.FLMPipeline", "pt": ["AutoModel"]}}


class FLMPipeline(Pipeline):
    r"""
    Texts in one call. The models start from noise and not from a prompt, so that there is no input, only the parameters of
    [`~FLMGenerationMixin.generate`].

    Args:
        kwargs: As for [`~transformers.Pipeline`], of which `model` and `tokenizer` are needed; and parameters of `generate`
            and of a call to keep as defaults.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> pipe = pipeline("text-generation", model="path/to/model", trust_remote_code=True)
    >>> pipe(num_samples=2, num_steps=1)
    [{'generated_text': '...'}, {'generated_text': '...'}]
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

    def __call__(self, *args, **kwargs) -> list[dict[str, Any]]:
        """
        Generates texts.

        Args:
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether to leave special tokens out of the texts.
            return_tensors (`bool`, *optional*, defaults to `False`):
                Whether to return the tokens as well, as `"generated_token_ids"`.
            kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_samples`, `num_steps` or `generator`.

        Returns:
            `list[dict[str, Any]]`: for each of `num_samples` texts a dictionary with `"generated_text"`.

        Raises:
            `ValueError`: if there is a prompt, or a parameter is unknown or has a value that cannot be used.
        """
        if args:
            raise ValueError(
                "There is no prompt: the model generates whole texts from noise. Pass the number of texts as "
                "`num_samples` and other parameters of `generate()` by name."
            )
        _, generate_kwargs, decode_kwargs = self._sanitize_parameters(**kwargs)
        generate_kwargs = {**self._forward_params, **generate_kwargs}
        return self.run_single(None, {}, generate_kwargs, {**self._postprocess_params, **decode_kwargs})

    def _sanitize_parameters(self, skip_special_tokens=None, return_tensors=None, **generate_kwargs):
        decode = {"skip_special_tokens": skip_special_tokens, "return_tensors": return_tensors}
        return {}, generate_kwargs, {name: value for name, value in decode.items() if value is not None}

    def preprocess(self, input_):
        return {}

    def _forward(self, model_inputs, **generate_kwargs):
        return self.model.generate(**{**generate_kwargs, "return_dict_in_generate": True})

    def postprocess(self, model_outputs, skip_special_tokens=True, return_tensors=False):
        tokens = model_outputs.sequences
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=skip_special_tokens)
        rows = [{"generated_text": text} for text in texts]
        if return_tensors:
            for row, row_tokens in zip(rows, tokens.tolist()):
                row["generated_token_ids"] = row_tokens
        return rows


__all__ = ["FLMPipeline"]
