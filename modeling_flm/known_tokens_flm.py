# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""What is known of the texts that are generated: prompts, masks, padding, and where texts end."""

from dataclasses import dataclass, replace

import torch
from transformers.utils import logging

from .generation_config_flm import FLMGenerationConfig


logger = logging.get_logger(__name__)


@dataclass
class KnownTokens:
    """What is known of a batch of texts: tokens where `mask`, and which positions there are."""

    tokens: torch.LongTensor  # (num_samples, length), with padding where nothing is known
    mask: torch.BoolTensor | None = None
    attention_mask: torch.BoolTensor | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> "KnownTokens":
        masks = (None if mask is None else mask[rows] for mask in (self.mask, self.attention_mask))
        return KnownTokens(self.tokens[rows], *masks)

    @property
    def is_fixed(self) -> torch.BoolTensor | None:
        """Where there is nothing to generate."""
        if self.attention_mask is None:
            return self.mask
        return ~self.attention_mask if self.mask is None else self.mask | ~self.attention_mask

    @property
    def is_open(self) -> torch.BoolTensor:
        """Where there is something to generate."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.is_fixed is None else ~self.is_fixed

    def commit(self, tokens: torch.LongTensor, where: torch.BoolTensor) -> "KnownTokens":
        """What is known once these tokens are."""
        mask = where if self.mask is None else self.mask | where
        return replace(self, tokens=torch.where(where, tokens, self.tokens), mask=mask)

    def start(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """A state of noise with the clean state of what is known in its place."""
        if self.mask is None:
            return state
        clean = embedding[self.tokens.masked_fill(~self.mask, 0)]
        return torch.where(self.mask[..., None], clean, state)

    def complete(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """Generated tokens with what is known in its place."""
        return tokens if self.is_fixed is None else torch.where(self.is_fixed, self.tokens, tokens)

    def complete_soft(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The same for soft tokens; where there is no position, there is none."""
        if self.is_fixed is None:
            return probabilities
        certain = torch.zeros_like(probabilities)
        if self.mask is not None:
            tokens = self.tokens.masked_fill(~self.mask, 0)[..., None]
            certain = certain.scatter(-1, tokens, self.mask[..., None].to(certain.dtype))
        return torch.where(self.is_fixed[..., None], certain, probabilities)


def check_known(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, prompt_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The masks as Booleans. Raises a `ValueError` where these arguments do not go together."""
    if input_ids is not None and (
        not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point()
    ):
        is_tensor = isinstance(input_ids, torch.Tensor)
        got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}" if is_tensor else type(input_ids).__name__
        raise ValueError(
            f"`input_ids` must be an integer tensor of shape (num_prompts, prompt_length), got {got}. (The number of texts "
            "is `num_samples`.)"
        )
    if prompt_mask is not None and input_ids is None:
        raise ValueError("`prompt_mask` says which of the `input_ids` are known: pass those as well.")
    for name, mask in (("attention_mask", attention_mask), ("prompt_mask", prompt_mask)):
        if mask is None:
            continue
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise ValueError(f"`{name}` must be a tensor with two dimensions, texts and positions.")
        if input_ids is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` of shape {tuple(mask.shape)} does not go with `input_ids` of shape {tuple(input_ids.shape)}."
            )
    return tuple(None if mask is None else mask.bool() for mask in (attention_mask, prompt_mask))


def prepare_known(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    config: FLMGenerationConfig,
    vocab_size: int,
    device: torch.device,
) -> KnownTokens:
    """What is known, for every text and all of its positions."""
    tokens = torch.full((config.num_samples, config.length), pad_token(config, 0), device=device)
    if input_ids is None and attention_mask is None:
        return KnownTokens(tokens)
    rows = torch.arange(config.num_samples, device=device)
    rows = rows // (config.num_samples // len(attention_mask if input_ids is None else input_ids))
    exists = None if attention_mask is None else attention_mask.to(device)
    if input_ids is None:
        return KnownTokens(tokens, None, exists[rows])
    ids = input_ids.to(device, torch.long)
    known = torch.ones_like(ids, dtype=torch.bool) if prompt_mask is None else prompt_mask.to(device)
    if exists is not None:
        known = known & exists
    if prompt_mask is None:  # padding may be on either side
        begins = known.long().diff(dim=1, prepend=ids.new_zeros(len(ids), 1)) == 1
        if (begins.sum(dim=1) > 1).any():
            raise ValueError(
                "`attention_mask` must be 0 on the sides of a prompt only. To generate what is between tokens, pass a "
                "`prompt_mask`."
            )
        _warn_of_ends(ids, known, config)
        if attention_mask is None:
            _warn_of_padding(ids, config)
        order = known.long().argsort(dim=1, descending=True, stable=True)
        ids, known, exists = ids.gather(1, order), known.gather(1, order), None
        ids, known = (x[:, : int(known.sum(dim=1).max())] for x in (ids, known))
    size = ids.shape[1]
    if size == config.length and (known | (False if exists is None else ~exists)).all(dim=1).any():
        logger.warning_once(
            f"There is nothing to write in a text whose `input_ids` are as long as texts are ({config.length} tokens)."
        )
    if size > config.length:
        raise ValueError(f"`input_ids` has {size} tokens, but texts have {config.length} (`length`).")
    if ((ids < 0) | (ids >= vocab_size))[known].any():
        raise ValueError(
            f"`input_ids` must be tokens of the model, from 0 to {vocab_size - 1}: is it another's tokenizer?"
        )
    tokens[:, :size] = torch.where(known, ids, tokens[0, 0])[rows]
    is_known = torch.zeros_like(tokens, dtype=torch.bool)
    is_known[:, :size] = known[rows]
    return KnownTokens(tokens, is_known, None if exists is None else exists[rows])


def _warn_of_ends(ids: torch.LongTensor, known: torch.BoolTensor, config: FLMGenerationConfig):
    """A prompt that ends in an end-of-sequence token is one that a tokenizer has added special tokens to."""
    if config.eos_token_id is None or ids.shape[1] < 2:
        return
    last = (known * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(dim=1, keepdim=True)
    eos = torch.tensor(config.eos_token_id, device=ids.device)
    if (torch.isin(ids.gather(1, last), eos) & (last > 0)).any():
        logger.warning_once(
            "`input_ids` end with an end-of-sequence token, which is kept as it is. If it is not meant, tokenize with "
            "`add_special_tokens=False`."
        )


def _warn_of_padding(ids: torch.LongTensor, config: FLMGenerationConfig):
    """Prompts whose padding is to be told from their tokens by an `attention_mask` that was left out."""
    pad = config.pad_token_id
    if pad is not None and ids.shape[1] > 1 and (ids[:, [0, -1]] == pad).any():
        logger.warning_once(
            "`input_ids` begin or end with padding, which is kept as part of the prompt: pass the tokenizer's "
            "`attention_mask` as well."
        )


def pad_token(config: FLMGenerationConfig, default: int | None = None) -> int | None:
    eos = config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    candidates = (config.pad_token_id, eos, default)
    return next((token for token in candidates if token is not None), None)


def pad_after_eos(sequences: torch.LongTensor, known: KnownTokens, config: FLMGenerationConfig) -> torch.LongTensor:
    """Texts up to the first end-of-sequence token, and padding. Known tokens stay, and do not end a text."""
    is_after = is_after_eos(sequences, known.is_open, config)
    return known.complete(sequences.masked_fill(is_after, pad_token(config)))


def is_after_eos(
    sequences: torch.LongTensor, may_end: torch.BoolTensor, config: FLMGenerationConfig
) -> torch.BoolTensor:
    """What comes after the first end-of-sequence token of each text, of those tokens that may end one."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    is_end = may_end & torch.isin(sequences, torch.tensor(eos, device=sequences.device))
    if config.bos_token_id in eos:
        is_end[:, 0] = False
    return is_end.cumsum(dim=1) - is_end.long() > 0
