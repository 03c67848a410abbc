# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What writes the texts of a batch: a flow-based model, or a causal language model."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.pipeline_flm import encode_prompts


@dataclass
class Text:
    """
    A text that is to be written.

    Args:
        prompt_ids (`list[int]`): The tokens that it begins with.
        length (`int`): The most tokens that it may have, with its prompt.
        seed (`int`): The seed of its noise, or of what is drawn for it.
        num_steps (`int`, *optional*): The number of steps of a flow-based model.
        temperature (`float`, *optional*): Divides the logits.
        is_abandoned (`bool`, *optional*, defaults to `False`): Whether nobody waits for it any more.
    """

    prompt_ids: list[int]
    length: int
    seed: int
    num_steps: int | None = None
    temperature: float | None = None
    is_abandoned: bool = False


class Abandoned(Exception):
    """Nobody waits for any text of a batch, which is therefore not written to its end."""


def check_wanted(texts: list[Text]):
    """Raises [`Abandoned`] if nobody waits for any of the texts."""
    if all(text.is_abandoned for text in texts):
        raise Abandoned


def stack_prompts(texts: list[Text], side: str, device: torch.device) -> dict[str, torch.LongTensor]:
    """The `input_ids` and the `attention_mask` of how texts begin, with the padding on one side."""
    rows = [torch.tensor(text.prompt_ids, dtype=torch.long, device=device) for text in texts]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_side=side),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
    }


class FlowWriter:
    """
    Writes texts with a flow-based model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
    """

    takes_steps = True

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        config = model.generation_config
        self.max_length = config.length or model.config.max_position_embeddings
        self.bos_token_id, self.eos_token_id = config.bos_token_id, config.eos_token_id

    def encode(self, prompt: str) -> list[int]:
        if prompt == "":
            return []
        return encode_prompts(self.tokenizer, [prompt], self.bos_token_id)["input_ids"][0].tolist()

    def group(self, text: Text) -> tuple:
        """Texts for which this is the same can be written together."""
        own = self.model.generation_config
        # With the model's own values for what is left out, so that these texts go with those that ask for the same
        num_steps = own.num_steps if text.num_steps is None and own.timestep_grid is None else text.num_steps
        temperature = own.temperature if text.temperature is None else text.temperature
        return text.length, num_steps, 1 if temperature is None else temperature

    def write(self, texts: list[Text]) -> list[list[int]]:
        """The tokens of each text after its prompt. All are of one group."""
        first = texts[0]
        tokens = self.model.generate(
            num_samples=len(texts),
            num_steps=first.num_steps,
            batch_size=len(texts),
            length=first.length,
            # Of the CPU, on which every device draws the same; one for each text, which then does not depend on the others
            generator=[torch.Generator().manual_seed(text.seed) for text in texts],
            callback=lambda *progress: check_wanted(texts),
            **({} if first.temperature is None else {"temperature": first.temperature}),
            **(stack_prompts(texts, "right", self.model.device) if any(text.prompt_ids for text in texts) else {}),
        )
        return [row[len(text.prompt_ids) :] for row, text in zip(tokens.tolist(), texts)]


class DrawTokens(LogitsProcessor):
    """
    Leaves one token of each text, which is drawn, with one uniform variable from the text's own generator.

    Args:
        texts (`list[Text]`): The texts of the batch.
    """

    def __init__(self, texts: list[Text]):
        self.generators = [torch.Generator().manual_seed(text.seed) for text in texts]
        self.temperatures = torch.tensor([[text.temperature or 1.0] for text in texts])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        uniforms = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        cumulative = (scores.float() / self.temperatures.to(scores.device)).softmax(dim=-1).cumsum(dim=-1)
        tokens = torch.searchsorted(cumulative, uniforms.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(max=scores.shape[1] - 1), 0.0)


class StopAbandoned(StoppingCriteria):
    """Ends a batch of which nobody waits for any text."""

    def __init__(self, texts: list[Text]):
        self.texts = texts

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        check_wanted(self.texts)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class CausalWriter:
    """
    Writes texts with a causal language model and its KV cache. Takes the same arguments as [`FlowWriter`].
    """

    takes_steps = False

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        own = model.generation_config
        self.max_length = getattr(model.config, "max_position_embeddings", None) or 1024
        self.eos_token_id = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        candidates = (tokenizer.bos_token_id, own.bos_token_id, tokenizer.eos_token_id, 0)
        self.bos_token_id = next(token for token in candidates if token is not None)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"] or [self.bos_token_id]

    def group(self, text: Text) -> tuple:
        # Rows of one batch go on until the last one ends, beyond the model's length if their prompts are longer.
        return (text.length - len(text.prompt_ids),)

    def write(self, texts: list[Text]) -> list[list[int]]:
        prompts = stack_prompts(texts, "left", self.model.device)
        tokens = self.model.generate(
            **prompts,
            max_new_tokens=texts[0].length - len(texts[0].prompt_ids),
            do_sample=False,  # as `DrawTokens` has drawn
            num_beams=1,
            logits_processor=LogitsProcessorList([DrawTokens(texts)]),
            stopping_criteria=StoppingCriteriaList([StopAbandoned(texts)]),
            pad_token_id=self.bos_token_id,
        )
        return tokens[:, prompts["input_ids"].shape[1] :].tolist()


def load_writer(path: str, device: str, dtype: str) -> FlowWriter | CausalWriter:
    """The model with this name, or in this folder, and its tokenizer."""
    is_flow = AutoConfig.from_pretrained(path).model_type in FLOW_MODEL_TYPES
    model_class = AutoModel if is_flow else AutoModelForCausalLM
    model = model_class.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
    return (FlowWriter if is_flow else CausalWriter)(model, AutoTokenizer.from_pretrained(path))
