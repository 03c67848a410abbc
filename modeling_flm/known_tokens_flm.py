# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Known tokens of the sequences to generate: prompts, masks, padding, and the rule for where a text ends."""

from dataclasses import dataclass, replace

import torch
from transformers.utils import logging

from .generation_config_flm import FLMGenerationConfig


logger = logging.get_logger(__name__)


@dataclass
class KnownTokens:
    """
    Known tokens of a batch of sequences.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, length)`): The known tokens, and padding elsewhere.
        mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): Mask of the known tokens. `None` if no token is known.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*):
            Mask of the real positions. `None` if nothing is padded.
        negative (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
            The tokens to guide away from, at known positions. The second half of a state has these.
    """

    tokens: torch.LongTensor
    mask: torch.BoolTensor | None = None
    attention_mask: torch.BoolTensor | None = None
    negative: torch.LongTensor | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> "KnownTokens":
        tensors = (self.tokens, self.mask, self.attention_mask, self.negative)
        return KnownTokens(*(None if tensor is None else tensor[rows] for tensor in tensors))

    @property
    def is_fixed(self) -> torch.BoolTensor | None:
        """Positions with nothing to generate: known tokens and padding. `None` if there are none."""
        if self.attention_mask is None:
            return self.mask
        return ~self.attention_mask if self.mask is None else self.mask | ~self.attention_mask

    @property
    def is_open(self) -> torch.BoolTensor:
        """Positions to generate, of shape `(batch_size, length)`."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.is_fixed is None else ~self.is_fixed

    def commit(self, tokens: torch.LongTensor, where: torch.BoolTensor) -> "KnownTokens":
        """Returns the known tokens with `tokens` added where the mask `where` is set."""
        mask = where if self.mask is None else self.mask | where
        negative = None if self.negative is None else torch.where(where, tokens, self.negative)
        return replace(self, tokens=torch.where(where, tokens, self.tokens), mask=mask, negative=negative)

    def start(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Replaces noise by the clean state at known tokens."""
        if self.mask is None:
            return state
        clean = embedding[self.tokens.masked_fill(~self.mask, 0)]
        if self.negative is not None:
            half = embedding.shape[1] // 2
            negative = embedding[self.negative.masked_fill(~self.mask, 0)]
            clean = torch.cat([clean[..., :half], negative[..., half:]], dim=-1)
        return torch.where(self.mask[..., None], clean, state)

    def complete(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """Replaces generated tokens by known tokens, and by padding outside the sequence."""
        return tokens if self.is_fixed is None else torch.where(self.is_fixed, self.tokens, tokens)

    def complete_soft(self, probabilities: torch.Tensor) -> torch.Tensor:
        """As `complete`, for probabilities. Positions outside the sequence get zeros."""
        if self.is_fixed is None:
            return probabilities
        certain = torch.zeros_like(probabilities)
        if self.mask is not None:
            tokens = self.tokens.masked_fill(~self.mask, 0)[..., None]
            certain = certain.scatter(-1, tokens, self.mask[..., None].to(certain.dtype))
        return torch.where(self.is_fixed[..., None], certain, probabilities)


@dataclass
class Prompts:
    """
    The `input_ids`, `attention_mask`, `prompt_mask` and `negative_prompt_ids` of a call of [`~FLMGenerationMixin.generate`]. Masks become Boolean.

    Raises:
        `ValueError`: if their types or shapes do not match.
    """

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    prompt_mask: torch.Tensor | None
    negative_prompt_ids: torch.Tensor | None = None

    def __post_init__(self):
        ids, negative = self.input_ids, self.negative_prompt_ids
        if ids is not None and (not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point()):
            got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(
                f"`input_ids` must be an integer tensor of shape (num_prompts, prompt_length), got {got}. (To set the number of "
                "samples, pass `num_samples`.)"
            )
        if self.prompt_mask is not None and ids is None:
            raise ValueError("`prompt_mask` marks the known tokens of `input_ids`: pass `input_ids` as well.")
        if negative is not None:
            shape = None if ids is None else tuple(ids.shape)
            fits = isinstance(negative, torch.Tensor) and not negative.is_floating_point() and ids is not None
            if not fits or tuple(negative.shape) not in (shape, (1, *shape[1:])):
                raise ValueError(
                    "`negative_prompt_ids` must be tokens in the place of `input_ids`: an integer tensor of their shape, or of one row. "
                    f"Got {tuple(negative.shape) if isinstance(negative, torch.Tensor) else type(negative).__name__} for {shape}."
                )
            self.negative_prompt_ids = negative.expand(ids.shape)
        for name in ("attention_mask", "prompt_mask"):
            mask = getattr(self, name)
            if mask is None:
                continue
            if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
                raise ValueError(f"`{name}` must be a tensor with two dimensions, sequences and positions.")
            if ids is not None and mask.shape != ids.shape:
                raise ValueError(
                    f"`{name}` of shape {tuple(mask.shape)} does not match `input_ids` of shape {tuple(ids.shape)}."
                )
            setattr(self, name, mask.bool())

    @property
    def full_length(self) -> int | None:
        """Length of the samples, where a mask covers all of their positions."""
        mask = self.prompt_mask if self.input_ids is not None else self.attention_mask
        return None if mask is None else mask.shape[1]

    @property
    def num_rows(self) -> int | None:
        """Number of rows of `input_ids`, or of the `attention_mask` without `input_ids`."""
        tensor = self.attention_mask if self.input_ids is None else self.input_ids
        return None if tensor is None else len(tensor)

    @property
    def common_length(self) -> int | None:
        """Length of all prompts. `None` if they differ in length, or if a `prompt_mask` marks the known tokens."""
        if self.input_ids is None:
            return 0
        if self.prompt_mask is not None:
            return None
        if self.attention_mask is None:
            return self.input_ids.shape[1]
        lengths = self.attention_mask.sum(dim=1).unique().tolist()
        return lengths[0] if len(lengths) == 1 else None

    def sizes(self) -> dict[str, int]:
        """Returns the default `num_samples` and `length`, where the arguments imply them."""
        sizes = {"num_samples": self.num_rows, "length": self.full_length}
        return {name: size for name, size in sizes.items() if size is not None}

    def known_tokens(self, config: FLMGenerationConfig, vocab_size: int, device: torch.device) -> KnownTokens:
        """
        Returns the known tokens of every sample, at all of its positions.

        Args:
            config ([`FLMGenerationConfig`]): The resolved configuration.
            vocab_size (`int`): The size of the vocabulary.
            device (`torch.device`): The device of the model.
        """
        self._check_sizes(config)
        tokens = torch.full((config.num_samples, config.length), pad_token(config), device=device)
        if self.num_rows is None:
            return KnownTokens(tokens)
        rows = torch.arange(config.num_samples, device=device) // (config.num_samples // self.num_rows)
        attended = None if self.attention_mask is None else self.attention_mask.to(device)
        if self.input_ids is None:
            return KnownTokens(tokens, None, attended[rows])
        ids = self.input_ids.to(device, torch.long)
        known = torch.ones_like(ids, dtype=torch.bool) if self.prompt_mask is None else self.prompt_mask.to(device)
        if attended is not None:
            known = known & attended
        if self.prompt_mask is None:
            ids, known = _align_left(ids, known, config, with_mask=attended is not None)
            attended = None
        size = ids.shape[1]
        if size == config.length and (known | (False if attended is None else ~attended)).all(dim=1).any():
            logger.warning_once(
                f"`input_ids` already has the full length of {config.length} tokens, so there is nothing to generate."
            )
        if size > config.length:
            raise ValueError(f"`input_ids` has {size} tokens, but samples have {config.length} (`length`).")
        if ((ids < 0) | (ids >= vocab_size))[known].any():
            raise ValueError(
                f"`input_ids` must be between 0 and {vocab_size - 1}. Does the tokenizer belong to a different model?"
            )
        tokens[:, :size] = torch.where(known, ids, tokens[0, 0])[rows]
        is_known = torch.zeros_like(tokens, dtype=torch.bool)
        is_known[:, :size] = known[rows]
        negative = None
        if self.negative_prompt_ids is not None:
            prompts = replace(self, input_ids=self.negative_prompt_ids, negative_prompt_ids=None)
            negative = prompts.known_tokens(config, vocab_size, device).tokens
        return KnownTokens(tokens, is_known, None if attended is None else attended[rows], negative)

    def _check_sizes(self, config: FLMGenerationConfig):
        if self.attention_mask is not None and (self.full_length or config.length) != config.length:
            raise ValueError(
                f"`attention_mask` must cover all positions of a sample, but has {self.full_length}: leave out "
                f"`length={config.length}`."
            )
        if self.num_rows is not None and (self.num_rows == 0 or config.num_samples % self.num_rows != 0):
            name = "attention_mask" if self.input_ids is None else "input_ids"
            raise ValueError(
                f"`num_samples={config.num_samples}` is not a multiple of the {self.num_rows} rows of `{name}`: every row gets "
                "the same number of samples."
            )


def _align_left(
    ids: torch.LongTensor, known: torch.BoolTensor, config: FLMGenerationConfig, with_mask: bool
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Moves prompts that are padded on either side to the left."""
    starts = known.long().diff(dim=1, prepend=ids.new_zeros(len(ids), 1)) == 1
    if (starts.sum(dim=1) > 1).any():
        raise ValueError(
            "`attention_mask` may be 0 only before and after a prompt. To generate tokens in between, pass a `prompt_mask`."
        )
    _warn_about_eos(ids, known, config)
    if not with_mask:
        _warn_about_padding(ids, config)
    order = known.long().argsort(dim=1, descending=True, stable=True)
    size = int(known.sum(dim=1).max())
    return ids.gather(1, order)[:, :size], known.gather(1, order)[:, :size]


def _warn_about_eos(ids: torch.LongTensor, known: torch.BoolTensor, config: FLMGenerationConfig):
    """Warns about prompts that end with an EOS token, which a tokenizer may have added."""
    if config.eos_token_id is None or ids.shape[1] < 2:
        return
    last = (known * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(dim=1, keepdim=True)
    eos = torch.tensor(config.eos_token_id, device=ids.device)
    if (torch.isin(ids.gather(1, last), eos) & (last > 0)).any():
        logger.warning_once(
            "`input_ids` end with an end-of-sequence token, which stays in the samples. If this is not intended, tokenize with "
            "`add_special_tokens=False`."
        )


def _warn_about_padding(ids: torch.LongTensor, config: FLMGenerationConfig):
    """Warns about padded prompts without an `attention_mask`."""
    pad = config.pad_token_id
    if pad is not None and ids.shape[1] > 1 and (ids[:, [0, -1]] == pad).any():
        logger.warning_once(
            "`input_ids` begin or end with padding, which counts as part of the prompt: pass the tokenizer's `attention_mask` as "
            "well."
        )


def pad_token(config: FLMGenerationConfig) -> int:
    """Returns the padding token: `pad_token_id`, else the first EOS token, else 0."""
    eos = config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    return next(token for token in (config.pad_token_id, eos, 0) if token is not None)


def begin_tokens(config: FLMGenerationConfig) -> list[int]:
    """Returns the tokens that texts begin with: the BOS token, if the texts of the training did, or none."""
    return [] if config.bos_token_id is None else [config.bos_token_id]


def is_begin(
    sequences: torch.LongTensor, attention_mask: torch.BoolTensor | None, config: FLMGenerationConfig
) -> torch.BoolTensor:
    """Marks the tokens of [`begin_tokens`] in sequences of shape `(num_sequences, length)`, which are known and not predicted."""
    attended = torch.ones_like(sequences, dtype=torch.bool) if attention_mask is None else attention_mask
    is_first = attended & (attended.cumsum(dim=1) == 1)
    return is_first & torch.isin(sequences, sequences.new_tensor(begin_tokens(config)))


def lengths_up_to_eos(
    sequences: torch.LongTensor,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | None = None,
    may_end: torch.BoolTensor | None = None,
) -> torch.LongTensor:
    """
    Lengths of sequences up to and including their first EOS token: the one rule for where texts end. Where one token is both
    BOS and EOS, as in GPT-2, it does not end a sequence at its first position.

    Args:
        sequences (`torch.LongTensor` of shape `(num_sequences, length)`): The tokens.
        eos_token_id (`int` or `list[int]`, *optional*): The EOS token, or several. `None` for sequences that do not end.
        bos_token_id (`int`, *optional*): The BOS token. Leave it out for sequences that continue a prompt.
        may_end (`torch.BoolTensor` of shape `(num_sequences, length)`, *optional*):
            Positions that may end a sequence. By default all.

    Returns:
        `torch.LongTensor` of shape `(num_sequences,)`: `length` where no EOS token was found.
    """
    eos = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    is_end = torch.isin(sequences, torch.tensor(eos, dtype=sequences.dtype, device=sequences.device))
    if may_end is not None:
        is_end &= may_end
    if bos_token_id in eos:
        is_end[:, :1] = False
    return (is_end.cumsum(dim=1) - is_end.long() == 0).sum(dim=1)


def is_after_eos(
    sequences: torch.LongTensor, may_end: torch.BoolTensor, config: FLMGenerationConfig
) -> torch.BoolTensor:
    """Marks the positions after the end of each sequence, see [`lengths_up_to_eos`]."""
    lengths = lengths_up_to_eos(sequences, config.eos_token_id, config.bos_token_id, may_end)
    return torch.arange(sequences.shape[1], device=sequences.device) >= lengths[:, None]


def pad_after_eos(sequences: torch.LongTensor, known: KnownTokens, config: FLMGenerationConfig) -> torch.LongTensor:
    """Replaces generated tokens after the first generated EOS token by padding. Known tokens stay, and do not end a text."""
    is_after = is_after_eos(sequences, known.is_open, config)
    return known.complete(sequences.masked_fill(is_after, pad_token(config)))
