# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer (DiT): time embedding, modulation, attention and blocks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_flm import FLMConfig, FMLMConfig
from .utils_flm import chunks, may_overwrite


class FLMLayerNorm(nn.LayerNorm):
    """Layer normalization without bias, computed and returned in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden_states.float(), self.weight.shape, self.weight.float(), None, self.eps)


def apply_linear(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Applies a linear layer in the dtype of its bias, because quantized weights have a different one."""
    bias = layer.bias
    # In layers quantized dynamically by torch, `bias` is a method; they take float32.
    return layer(inputs.to(bias.dtype if isinstance(bias, torch.Tensor) else torch.float32))


class FLMTimeEmbedding(nn.Module):
    """Embeds times in [0, 1], of shape `(batch_size,)` or `(batch_size, sequence_length)`, into `(..., conditioning_size)`."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.num_frequencies = config.timestep_embedding_size // 2
        self.linear_1 = nn.Linear(config.timestep_embedding_size, config.conditioning_size)
        self.linear_2 = nn.Linear(config.conditioning_size, config.conditioning_size)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=times.device)
        frequencies = torch.exp(-math.log(10000) / self.num_frequencies * exponents)
        angles = times.float()[..., None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(apply_linear(self.linear_1, sinusoids)))


class FLMLossWeighting(nn.Module):
    """Learned logarithm of the loss weight, of the shape of the times."""

    # Names that a model with such a module adds to its own
    _keep_in_fp32_modules_strict = ["loss_weighting"]
    _keep_in_fp32_modules = [".*loss_weighting"]

    def __init__(self, config: FMLMConfig):
        super().__init__()
        self.time_embedding = FLMTimeEmbedding(config)
        self.linear_1 = nn.Linear(config.conditioning_size, 128)
        self.linear_2 = nn.Linear(128, 1)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.time_embedding(times)))).squeeze(-1)


def modulations(layer: nn.Module, conditioning: torch.Tensor, num_chunks: int) -> tuple[torch.Tensor, ...]:
    """
    Projects the conditioning, of shape `(batch_size, 1 or sequence_length, conditioning_size)`, to `num_chunks` modulations of
    shape `(batch_size, 1 or sequence_length, hidden_size)`.
    """
    return apply_linear(layer, conditioning).chunk(num_chunks, dim=-1)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns `normed * (1 + scale) + shift`, in the dtype of `normed`, float32."""
    return torch.addcmul(shift.to(normed.dtype), normed, 1 + scale.to(normed.dtype))


def rotary_embedding(
    length: int, head_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines of the rotary position embedding, each of shape `(length, head_dim)`. Computed in every forward pass,
    which costs little compared to a block, because `from_pretrained` would lose a buffer.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `x` of shape `(batch_size, num_heads, sequence_length, head_dim)` in non-interleaved halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query`, `key` and `value` of shape `(batch_size, num_heads, sequence_length, head_dim)`."""
    batch_size, num_heads, length, _ = query.shape
    keeps_weights = torch.is_grad_enabled() or output_attentions or module.config.output_attentions
    rows = [] if keeps_weights else chunks(1, batch_size, num_heads * length**2, query.device)
    if len(rows) > 1:
        # The attention weights are not kept: with a few sequences at a time, their memory does not grow with the batch.
        tensors = [query, key, value] + (
            [] if attention_mask is None else [attention_mask.expand(batch_size, -1, -1, -1)]
        )
        outputs = []
        for chunk in rows:
            part = [tensor[chunk] for tensor in tensors] + [None] * (attention_mask is None)
            outputs.append(eager_attention_forward(module, *part, scaling, softcap)[0])
        return torch.cat(outputs), None
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        weights = softcap * torch.tanh(weights / softcap)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class FLMAttention(nn.Module):
    """Bidirectional multi-head attention with rotary positions and softcapped logits."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, length, hidden_size = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch_size, length, 3, -1, self.head_dim)
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(dim=2))
        # The float32 tables promote: convert back to the dtype of the value, as attention functions expect.
        query = apply_rotary_embedding(query, *position_embeddings).to(value.dtype)
        key = apply_rotary_embedding(key, *position_embeddings).to(value.dtype)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            softcap=self.config.attn_logit_softcapping,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch_size, length, hidden_size)), weights


class FLMMLP(nn.Module):
    def __init__(self, config: FLMConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.up_proj(hidden_states)
        # In place if possible: this tensor takes the most memory in sampling.
        gelu = torch.ops.aten.gelu_ if may_overwrite(self.up_proj) else F.gelu
        return self.down_proj(gelu(inner, approximate="tanh"))


class FLMLayer(GradientCheckpointingLayer):
    """A block of the diffusion transformer (DiT): attention and MLP, modulated and gated by the time (adaLN-Zero)."""

    def __init__(self, config: FLMConfig):
        super().__init__()
        self.norm1 = FLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = FLMAttention(config)
        self.norm2 = FLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FLMMLP(config)
        self.modulation = nn.Linear(config.conditioning_size, 6 * config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.compiled = None  # see `compile_regions`

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, **kwargs) -> torch.Tensor:
        return (self.compiled or FLMLayer.compute)(self, hidden_states, conditioning, **kwargs)

    def compute(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, **kwargs) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.modulation, conditioning, 6)
        dtype = hidden_states.dtype
        normed = modulate(self.norm1(hidden_states), shift1, scale1).to(dtype)
        attention, _ = self.self_attn(normed, **kwargs)
        hidden_states = torch.addcmul(hidden_states, gate1, self.dropout(attention))
        normed = modulate(self.norm2(hidden_states), shift2, scale2).to(dtype)
        return torch.addcmul(hidden_states, gate2, self.dropout(self.mlp(normed)))
