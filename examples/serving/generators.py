# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Generators of a batch of samples: one for flow-based models, one for causal language models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_flm.configuration_flm import FLOW_MODEL_TYPES
from modeling_flm.hub.loading import load_checked
from modeling_flm.known_tokens_flm import lengths_up_to_eos
from modeling_flm.pipeline_flm import encode_prompts, encode_texts
from modeling_flm.tokenization_flm import count_unknown_tokens
from modeling_flm.trainers.evaluation import find_bos_token, find_eos_tokens, generate_causal_samples, pad_tokens


@dataclass
class SampleRequest:
    """
    One sample to generate.

    Args:
        prompt_ids (`list[int]`): Tokens of the prompt.
        length (`int`): Largest number of tokens, including the prompt.
        generator (`torch.Generator`): Random generator of this sample, on the CPU, so that it does not depend on its batch.
        num_steps (`int`, *optional*): Number of steps of a flow-based model.
        temperature (`float`, *optional*): Divides the logits.
        gamma (`float`, *optional*): Share of fresh noise at every step of a flow-based model.
    """

    prompt_ids: list[int]
    length: int
    generator: torch.Generator
    num_steps: int | None = None
    temperature: float | None = None
    gamma: float | None = None


def split_sample(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> tuple[str, str]:
    """
    Decodes a sample.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        prompt_ids (`list[int]`): Tokens of the prompt.
        new_ids (`list[int]`): Generated tokens.

    Returns:
        `tuple[str, str]`: the prompt as the model read it, in which a token such as `[UNK]` stands for unknown words, and the
        generated text.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    hidden = special - {tokenizer.unk_token_id} if count_unknown_tokens(tokenizer, [prompt_ids]) else special
    prompt_ids = [token for token in prompt_ids if token not in hidden]
    new_ids = [token for token in new_ids if token not in special]
    # Decoded with the prompt, because some tokenizers drop a space at the start
    prompt, whole = tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids + new_ids)
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(new_ids)


class FlowGenerator:
    """
    Generates samples with a flow-based model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
    """

    has_steps = True

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        config = model.generation_config
        self.max_length = config.length or model.config.max_position_embeddings
        self.bos_token_id, eos = config.bos_token_id, config.eos_token_id
        self.eos_token_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]

    def encode(self, prompt: str) -> list[int]:
        if prompt == "":
            return []
        return encode_prompts(self.tokenizer, [prompt], self.bos_token_id, argument="prompt")["input_ids"][0].tolist()

    def batch_key(self, sample: SampleRequest) -> tuple:
        """Samples with equal keys can share a batch."""
        # A request that leaves out a setting has the model's value, as one that passes the same value.
        defaults = self.model.generation_config
        num_steps = (
            defaults.num_steps if sample.num_steps is None and defaults.timestep_grid is None else sample.num_steps
        )
        temperature = defaults.temperature if sample.temperature is None else sample.temperature
        gamma = sample.gamma
        if gamma is None and defaults.sampler_config is None:
            gamma = defaults.gamma or 0.0
        return sample.length, num_steps, 1 if temperature is None else temperature, gamma

    def generate(self, samples: list[SampleRequest], callback: Callable[[], None]) -> list[list[int]]:
        """
        Generates the samples of one batch.

        Args:
            samples (`list[SampleRequest]`): Samples with equal keys.
            callback (`Callable[[], None]`): Called after every step. An error that it raises ends the batch.

        Returns:
            `list[list[int]]`: the new tokens of each sample, up to and including its first EOS token.
        """
        first = samples[0]
        prompts = [sample.prompt_ids for sample in samples]
        options = {"temperature": first.temperature, "gamma": first.gamma}  # `None` for the model's
        if any(prompts):
            options["input_ids"], options["attention_mask"] = pad_tokens(prompts, device=self.model.device)
        tokens = self.model.generate(
            num_samples=len(samples),
            num_steps=first.num_steps,
            batch_size=len(samples),
            length=first.length,
            generator=[sample.generator for sample in samples],
            callback=lambda *progress: callback(),
            **options,
        ).cpu()
        lengths = [first.length] * len(samples)
        if self.eos_token_ids:
            is_new = torch.arange(first.length) >= torch.tensor([[len(prompt)] for prompt in prompts])
            own = self.model.generation_config
            lengths = lengths_up_to_eos(tokens, own.eos_token_id, own.bos_token_id, is_new).tolist()
        return [row[len(prompt) : length] for row, prompt, length in zip(tokens.tolist(), prompts, lengths)]


class CausalGenerator:
    """Generates samples with a causal language model and its KV cache. Same methods as [`FlowGenerator`]."""

    has_steps = False

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.max_length = getattr(model.config, "max_position_embeddings", None) or 1024
        self.bos_token_id = find_bos_token(model, tokenizer) or 0
        self.eos_token_ids = find_eos_tokens(model, tokenizer)

    def encode(self, prompt: str) -> list[int]:
        return encode_texts(self.tokenizer, [prompt], "prompt", add_special_tokens=True)[0] or [self.bos_token_id]

    def batch_key(self, sample: SampleRequest) -> int:
        # With different numbers of new tokens, samples with long prompts would exceed the model's length.
        return sample.length - len(sample.prompt_ids)

    def generate(self, samples: list[SampleRequest], callback: Callable[[], None]) -> list[list[int]]:
        return generate_causal_samples(
            self.model,
            [sample.prompt_ids for sample in samples],
            [sample.generator for sample in samples],
            max_new_tokens=self.batch_key(samples[0]),
            temperature=[sample.temperature or 1.0 for sample in samples],
            eos_token_id=self.eos_token_ids,
            generation_config=self.model.generation_config,  # for its penalties
            callback=callback,
        )


def load_generator(path: str, device: str, dtype: str) -> FlowGenerator | CausalGenerator:
    """Loads a model and its tokenizer from a folder or from the Hub."""
    is_flow = AutoConfig.from_pretrained(path).model_type in FLOW_MODEL_TYPES
    model_class = AutoModel if is_flow else AutoModelForCausalLM
    model = load_checked(model_class, path, dtype=getattr(torch, dtype)).to(device).eval()
    return (FlowGenerator if is_flow else CausalGenerator)(model, load_checked(AutoTokenizer, path))
