# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Samples of flow-based and of causal models. Each has a seed of its own, so that it does not depend on its batch."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_flm import FLMGenerationOutput
from modeling_flm.known_tokens_flm import lengths_up_to_eos

from ..batches import example_seed


# Random stream of samples. The trainers use other numbers.
SAMPLES_STREAM = 2


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Returns the random generator of each sample, on the CPU, from the seed of the evaluation and the sample's index."""
    return [torch.Generator().manual_seed(example_seed(seed, SAMPLES_STREAM, index)) for index in indices]


def generate_samples(
    model: PreTrainedModel, indices: Sequence[int], seed: int, **kwargs
) -> torch.LongTensor | FLMGenerationOutput:
    """
    Generates the samples of a flow-based model with the given indices. Each has its own noise, so that batch size and number
    of processes do not change it.

    Args:
        model ([`~transformers.PreTrainedModel`]): Model with the `generate` of this library.
        indices (`Sequence[int]`): Indices of the samples.
        seed (`int`): Seed of the evaluation.
        kwargs: Parameters of [`~FLMGenerationMixin.generate`], such as `num_steps` and `batch_size`.

    Returns:
        `torch.LongTensor` of shape `(len(indices), length)`, on the CPU; or the output of `generate` with
        `return_dict_in_generate=True`.
    """
    if len(indices) == 0:
        return torch.empty((0, 0), dtype=torch.long)
    output = model.generate(num_samples=len(indices), generator=sample_generators(seed, indices), **kwargs)
    return output.cpu() if isinstance(output, torch.Tensor) else output


def pad_tokens(
    token_lists: Sequence[Sequence[int]], side: str = "right", device: torch.device | str | None = None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Stacks sequences of different lengths.

    Args:
        token_lists (`Sequence[Sequence[int]]`): The tokens of each sequence.
        side (`str`, *optional*, defaults to `"right"`): Side of the padding, `"left"` or `"right"`.
        device (`torch.device` or `str`, *optional*): Device of the tensors. By default the CPU.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: `input_ids`, padded with 0, and `attention_mask`, both of shape
        `(len(token_lists), longest)`.
    """
    rows = [torch.tensor(tokens, dtype=torch.long, device=device) for tokens in token_lists]
    masks = [torch.ones_like(row) for row in rows]
    input_ids, attention_mask = (pad_sequence(part, batch_first=True, padding_side=side) for part in (rows, masks))
    return input_ids, attention_mask


def find_bos_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that texts of a causal model begin with: its BOS token, else its EOS token, else `None`."""
    candidates = (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), None)


def find_eos_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end texts of a model, from its generation config or else its tokenizer."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def ends_texts(model: PreTrainedModel) -> bool:
    """Returns whether a model was trained on one text per sequence, each with an end, see [`pad_dataset`]."""
    return bool(model.generation_config.to_dict().get("pad_after_eos"))  # other models have no such parameter


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[int]:
    """Returns what follows the `num_tokens` tokens of a text up to the model's length: an EOS token and padding."""
    eos = find_eos_tokens(model, tokenizer)[0]
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return [eos] + [pad] * (model.config.max_position_embeddings - num_tokens - 1)


class _DrawTokens(LogitsProcessor):
    """Draws one token for each text, with one uniform variable from the text's generator, and masks all others."""

    def __init__(self, generators, temperatures, filters, callback):
        self.generators, self.temperatures, self.filters, self.callback = generators, temperatures, filters, callback

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.callback is not None:
            self.callback()
        logits = self.filters(input_ids, scores.float() / self.temperatures.to(scores.device))
        uniforms = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
        tokens = torch.searchsorted(cumulative, uniforms.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(max=scores.shape[1] - 1), 0.0)


def generate_causal_samples(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
    max_new_tokens: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    generation_config: GenerationConfig | None = None,
    callback: Callable[[], None] | None = None,
) -> list[list[int]]:
    """
    Samples from a causal language model with its own `generate`, in one batch. Every text has its own generator, so that it
    does not depend on the other texts of the batch (except where rounding changes a near tie).

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model.
        prompts (`Sequence[Sequence[int]]`): Tokens that each text begins with, at least one.
        generators (`Sequence[torch.Generator]`): Generator of each text, on the CPU. It gives one uniform variable per token.
        max_new_tokens (`int`): Largest number of new tokens of a text.
        temperature (`float` or `Sequence[float]`, *optional*, defaults to 1.0): Temperature of all texts, or of each.
        top_k (`int`, *optional*): Samples from the `top_k` most likely tokens only.
        top_p (`float`, *optional*): Samples from the smallest set of tokens whose probabilities reach `top_p`.
        eos_token_id (`int` or `list[int]`, *optional*): Tokens that end a text. By default texts have `max_new_tokens`.
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            Further settings, such as a `repetition_penalty`. By default none, not even the model's own.
        callback (`Callable[[], None]`, *optional*): Called before every token. An error that it raises ends the batch.

    Returns:
        `list[list[int]]`: the new tokens of each text, up to and including its first EOS token.

    Example:

    ```python
    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from modeling_flm.trainers.evaluation import generate_causal_samples

    >>> model = AutoModelForCausalLM.from_pretrained("gpt2")
    >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    >>> tokens = generate_causal_samples(model, [[464], [464]], generators, max_new_tokens=5)
    >>> [len(row) for row in tokens]
    [5, 5]
    ```
    """
    input_ids, attention_mask = pad_tokens(prompts, "left", model.device)
    filters = LogitsProcessorList([] if top_k is None else [TopKLogitsWarper(top_k)])
    if top_p is not None and top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    temperatures = torch.as_tensor(temperature, dtype=torch.float32).reshape(-1, 1)
    ends = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    own_config = model.generation_config
    # `generate` fills gaps from the model's own config, so replacing that is the only way to leave its settings out.
    model.generation_config = GenerationConfig() if generation_config is None else generation_config
    try:
        tokens = model.generate(
            input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `_DrawTokens` draws
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=min(ends, default=0),
            logits_processor=LogitsProcessorList([_DrawTokens(generators, temperatures, filters, callback)]),
        )
    finally:
        model.generation_config = own_config
    tokens = tokens[:, input_ids.shape[1] :]
    lengths = lengths_up_to_eos(tokens, ends).tolist()
    return [row[:length] for row, length in zip(tokens.tolist(), lengths)]
