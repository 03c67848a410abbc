# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""The base class of flow-based language models: weights, states, `forward` and `posterior`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import CONFIG_NAME, ModelOutput, TransformersKwargs, cached_file, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .backbone_flm import FLMAttention, FLMLayer, FLMLayerNorm
from .configuration_flm import FLMConfig
from .flow import interpolate
from .generation_config_flm import FLMGenerationConfig
from .joint_noise import JointNoise
from .losses import softmax_cross_entropy, softmax_divergence
from .posterior_flm import Posterior, times_of
from .time_reparameterization import TimeMap
from .utils_flm import (
    CompiledFunction,
    chunks,
    describe_damage,
    has_values,
    raise_recompile_limit,
    use_default_mode,
)


# Arguments of other models for packed, cached or causal sequences, which would be ignored, at least by some attention functions
_OF_OTHER_BATCHES = (
    "position_ids",
    "past_key_values",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "is_causal",
)


@dataclass
class FLMOutput(ModelOutput):
    """
    Output of [`FLMModel`], [`FMLMModel`] and [`FMLMTwoNetworkModel`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            Mean over the tokens of the cross-entropy of the denoiser to the clean tokens, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*, returned by [`FLMModel`] and [`FMLMModel`]):
            Unnormalized log-probabilities of the clean tokens, after the cap of `config.final_logit_softcapping`:
            `softmax(logits)` is the denoiser `D_t` or the two-time denoiser.
        probabilities (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*, returned by [`FMLMTwoNetworkModel`]):
            The two-time denoiser, which may leave the simplex.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Input of the head, after the final modulated normalization. For [`FMLMTwoNetworkModel`] the inputs of both heads,
            concatenated.
        token_losses (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*, returned when `labels` is provided):
            Cross-entropy at each token, without gradient; 0 for labels of -100.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            Inputs of the blocks, and last `last_hidden_state`, each of shape `(batch_size, sequence_length, hidden_size)`. For
            [`FMLMTwoNetworkModel`] the hidden states of both networks, concatenated.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Attention weights of each block, of shape `(batch_size, num_heads, sequence_length, sequence_length)`. For
            [`FMLMTwoNetworkModel`] the heads of both networks.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class FLMPreTrainedModel(PreTrainedModel):
    """
    Base class of flow-based language models: weight initialization, features of the backbone, states, `forward` and
    `posterior`. A subclass defines `embeddings`, `encode`, `predict`, `predictions`, `cross_entropy_loss` and
    `divergence_loss`.

    The sampler and guidance use only `state_embedding`, `state_sizes`, `posterior`, `time_map` and `config`.
    """

    config: FLMConfig
    generation_config_class = FLMGenerationConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["FLMLayer"]
    _keep_in_fp32_modules_strict = ["lm_head", "norm", "norm1", "norm2", "time_embedding"]
    _keep_in_fp32_modules = [".*lm_head", ".*time_embedding"]  # not quantized
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FLMLayer, "attentions": FLMAttention}
    _states_require_grad = False  # see `enable_input_require_grads`
    softmax_divergence = staticmethod(softmax_divergence)
    softmax_cross_entropy = staticmethod(softmax_cross_entropy)

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        # Silently dropping the softcap would change the outputs. If no `attn_implementation` was passed, this error makes
        # transformers choose "eager".
        if self.config.attn_logit_softcapping is not None:
            raise ValueError(
                f"`attn_implementation='sdpa'` cannot apply `attn_logit_softcapping={self.config.attn_logit_softcapping}`. "
                "Pass `attn_implementation='eager'`, 'flex_attention' or 'flash_attention_2', or, for a model trained "
                "without softcapping, set `attn_logit_softcapping=None` in its config."
            )
        return super()._sdpa_can_dispatch(is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if any(module is other for other in self._layers_of_zeros()):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, FLMLayerNorm):
            init.ones_(module.weight)

    def _layers_of_zeros(self) -> list[nn.Module]:
        """Layers initialized to zero: blocks start as the identity, predictions as the uniform distribution."""
        return [module.modulation for module in self.modules() if isinstance(module, FLMLayer)]

    # To be defined by each model

    @property
    def embeddings(self) -> list[nn.Embedding]:
        """Token embedding of each network of the model."""
        raise NotImplementedError

    def encode(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Runs the backbone: everything before the head.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): Noised states.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                Reparameterized times of the states; 1 for known tokens.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): Target times, for flow maps.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 for padding.
            estimate (`torch.Tensor` of the shape of `state`, *optional*):
                Expected embedding of the clean tokens, for a model with `self_conditioning`. By default none, which is 0.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`: the input of the head, in float32.
        """
        raise NotImplementedError

    def predict(
        self,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
    ) -> torch.Tensor:
        r"""
        Computes the two-time denoiser \\(\delta_{s,t}\\) from the outputs of `encode`, or from a chunk of their positions.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_positions, embedding_size)`): The input of the head.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_positions)`): As for `encode`.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): As for `encode`.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*): Changes the logits, see `posterior`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`, in float32.
        """
        raise NotImplementedError

    def cross_entropy_loss(
        self,
        labels: torch.LongTensor,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cross-entropy of the two-time denoiser to clean tokens, computed one chunk of positions at a time.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Clean tokens. A token of -100 needs weight 0.
            token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Weight of each token's loss.
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): From `encode`.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): As for `encode`.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): As for `encode`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, and the losses without weights and gradient.
        """
        raise NotImplementedError

    def divergence_loss(
        self,
        divergence: str,
        target: Posterior,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Divergence of the two-time denoiser from target distributions, computed one chunk of positions at a time.

        Args:
            divergence (`str`): `"cross_entropy"`, `"kl"` or `"squared_error"`, see [`~losses.softmax_divergence`].
            target ([`~posterior_flm.Posterior`]): The target distributions.
            token_weights, hidden_states, tau_s, tau_t: As for `cross_entropy_loss`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, and the losses without weights and gradient.
        """
        raise NotImplementedError

    def log_loss_weight(self, tau_s: torch.Tensor) -> torch.Tensor | None:
        """Learned logarithm of the loss weight, of the shape of the times, or `None` for models without one."""
        return None

    # Shared by all models

    @property
    def state_embedding(self) -> torch.Tensor:
        """The embedding E in the states `x @ E`, of shape `(vocab_size, embedding_size)`."""
        weights = [self.embed_vocabulary(embedding) for embedding in self.embeddings]
        if len(weights) == 1:
            return weights[0]
        return torch.cat([weight.to(weights[0].device) for weight in weights], dim=1)

    @property
    def takes_estimate(self) -> bool:
        """Whether the network reads an estimate of the text beside the state (self-conditioning)."""
        return self.config.self_conditioning

    @property
    def state_sizes(self) -> list[int]:
        """Number of columns of a state for each network of the model."""
        return [self.config.hidden_size for _ in self.embeddings]

    def embed_vocabulary(self, embedding: nn.Embedding) -> torch.Tensor:
        """
        Returns the embedding matrix. Calls the module if its weight alone is not the whole matrix: with adapters, offloading or
        FSDP.
        """
        weight = embedding.weight
        # FSDP derives a class, with the same `forward`.
        is_plain = type(embedding).forward is nn.Embedding.forward and type(weight) is nn.Parameter
        if is_plain and weight.device.type != "meta":
            return weight
        device = "cpu" if weight.device.type == "meta" else weight.device
        return embedding(torch.arange(self.config.vocab_size, device=device))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings[0]

    def enable_input_require_grads(self):
        """As [`~transformers.PreTrainedModel.enable_input_require_grads`], also for noised states."""
        super().enable_input_require_grads()
        # Its hooks see calls of the embedding, and noised states read its weight.
        self._states_require_grad = True

    def disable_input_require_grads(self):
        super().disable_input_require_grads()
        self._states_require_grad = False

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Returns the input embedding if it has the size already. Other sizes are refused."""
        multiple, vocab_size = pad_to_multiple_of or 1, self.config.vocab_size
        size = math.ceil((new_num_tokens or vocab_size) / multiple) * multiple
        if size != vocab_size:
            raise NotImplementedError(
                f"The embedding has {vocab_size} tokens and cannot get {size}: times and noise depend on the vocabulary size, so "
                "resizing would require retraining. Build a model with another `vocab_size`."
            )
        return self.get_input_embeddings()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. Besides `AutoModel`, `AutoModelForCausalLM` and
        `AutoModelForMaskedLM` load the saved model.
        """
        name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        auto_classes = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForMaskedLM"), name)
        # As transformers does for `AutoModel` and `AutoConfig`
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_classes}
        super().save_pretrained(save_directory, *args, **kwargs)
        use_default_mode(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As [`~transformers.PreTrainedModel.from_pretrained`]. Raises an `OSError` that names a damaged file of weights."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            options = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder") if name in kwargs}
            options |= {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
            config = cached_file(pretrained_model_name_or_path, CONFIG_NAME, **options)
            adapter = kwargs.get("adapter_kwargs", {}).get("_adapter_model_path")
            folders = {pretrained_model_name_or_path, adapter, config and Path(config).parent} - {None}
            files = [path for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))]
            if damages := [damage for path in files if (damage := describe_damage(path)) is not None]:
                raise OSError(damages[0]) from error
            raise

    def compile_regions(self, **options):
        """
        Compiles the blocks and the softmax divergences, for all methods of this model. The code between them takes little time,
        and wrappers such as FSDP work on it. To compile a whole step of `generate`, pass `compile_config` to it. Raises
        `torch._dynamo.config.recompile_limit` to 64.

        Args:
            options: Arguments of `torch.compile`, such as `backend`, `mode` or `fullgraph`.
        """
        # All networks share this code: each needs a graph for training and evaluation, with and without padding.
        raise_recompile_limit()
        compute = CompiledFunction(FLMLayer.compute, options)
        for module in self.modules():
            if isinstance(module, FLMLayer):
                module.compiled = compute
            elif isinstance(module, FLMPreTrainedModel):
                module.softmax_divergence = CompiledFunction(softmax_divergence, options)
                module.softmax_cross_entropy = CompiledFunction(softmax_cross_entropy, options)

    def make_state(
        self,
        input_ids: torch.LongTensor,
        tau: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        joint_noise: JointNoise | None = None,
        time_map: TimeMap | None = None,
    ) -> torch.Tensor:
        """
        Returns the state of clean or noised tokens, in float32 also under autocast, and differentiable in the embeddings.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Clean tokens.
            tau (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`, *optional*):
                Reparameterized times; a token at time 1 is clean.
            noise (`torch.Tensor` of shape `(batch_size, sequence_length, noise_size)`, *optional*):
                Standard normal variables. For a single network `noise_size` is `min(vocab_size, hidden_size)`, see
                [`~joint_noise.noise_size`].
            joint_noise ([`~joint_noise.JointNoise`], *optional*):
                The noise of several models, from [`~joint_noise.JointNoise.of_networks`], if they must see the same noise.
                By default the noise of this model alone.
            time_map ([`ReparameterizedTime`] or [`IdentityTime`], *optional*):
                The time reparameterization of `tau`. By default the model's own.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`, to pass as `inputs_embeds`.
        """
        if (noise is None) != (tau is None):
            raise ValueError("`noise` and `tau` go together: pass both to noise the tokens, or none.")
        if noise is None:
            embedded = [embedding(input_ids) for embedding in self.embeddings]
            device, dtype = embedded[0].device, torch.promote_types(embedded[0].dtype, torch.float32)
            return torch.cat([part.to(device, dtype) for part in embedded], dim=-1)
        weights = [self.embed_vocabulary(embedding) for embedding in self.embeddings]
        device, dtype = weights[0].device, torch.promote_types(weights[0].dtype, torch.float32)
        weights = [weight.to(device, dtype) for weight in weights]
        joint_noise = JointNoise.of_networks(self) if joint_noise is None else joint_noise
        expected = (*input_ids.shape, joint_noise.size)
        if noise.shape != expected:
            raise ValueError(f"`noise` must have shape {expected}, got {tuple(noise.shape)}.")
        input_ids = input_ids.to(device)
        with torch.autocast(device.type, enabled=False):
            indices = joint_noise.indices_of(self)
            parts = [
                joint_noise.factor_and_tokens(index, weight, input_ids) for index, weight in zip(indices, weights)
            ]
            factor, clean = (torch.cat(each, dim=-1) for each in zip(*parts))
            noise = noise.to(torch.promote_types(noise.dtype, dtype))
            t = (self.time_map if time_map is None else time_map).tau_to_t(tau)
            state = interpolate(noise @ factor.to(noise), clean, t)
        return state.requires_grad_() if self._states_require_grad and torch.is_grad_enabled() else state

    def posterior(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        estimate: torch.Tensor | None = None,
    ) -> Posterior:
        r"""
        Returns the two-time denoiser \\(\delta_{s,t}\\), to be read one chunk of positions at a time.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): States at time `s`.
            tau_s, tau_t, attention_mask: As for `encode`.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Changes the logits. Called once per chunk, with scores of shape `(num_tokens, vocab_size)` and an empty prefix.
            estimate (`torch.Tensor` of the shape of `state`, *optional*): As for `encode`.

        Returns:
            [`~posterior_flm.Posterior`]: probabilities of the clean tokens, in float32. For an [`FMLMTwoNetworkModel`] they
            may leave the simplex.
        """
        hidden_states = self.encode(state, tau_s, tau_t, attention_mask, estimate)
        return self.posterior_of_features(hidden_states, tau_s, tau_t, logits_processor, state.device)

    def posterior_of_features(
        self,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        device: torch.device | None = None,
    ) -> Posterior:
        """
        Returns the result of `posterior` from the outputs of `encode`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): From `encode`.
            tau_s, tau_t, logits_processor: As for `posterior`.
            device (`torch.device`, *optional*): Device of the results. By default the device of `hidden_states`.
        """

        def probabilities(chunk: slice) -> torch.Tensor:
            times = (None if tau is None else times_of(tau, chunk) for tau in (tau_s, tau_t))
            return self.predict(hidden_states[:, chunk], *times, logits_processor)

        return Posterior(probabilities, self.chunks(hidden_states), device or hidden_states.device)

    def chunks(self, state: torch.Tensor) -> list[slice]:
        """Returns chunks of positions whose probabilities fit into memory, see [`~utils_flm.chunks`]."""
        return chunks(*state.shape[:2], self.config.vocab_size, state.device)

    def predictions(
        self, hidden_states: torch.Tensor, tau_s: torch.Tensor, tau_t: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Returns the field of [`FLMOutput`] for the two-time denoiser: `logits`, or for two networks `probabilities`."""
        raise NotImplementedError

    @capture_outputs
    def features(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        estimate: torch.Tensor | None = None,
        **kwargs,
    ) -> FLMOutput:
        """
        As `encode`, with the hidden states and attention weights of the blocks, on request by `output_hidden_states=True` and
        `output_attentions=True`.
        """
        return FLMOutput(last_hidden_state=self.encode(state, tau_s, tau_t, attention_mask, estimate, **kwargs))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        target_timesteps: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        estimate: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FLMOutput:
        r"""
        Denoises states, passed as `inputs_embeds`, or clean tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Clean tokens. To noise them, see [`~FLMPreTrainedModel.make_state`].
            timesteps (`torch.FloatTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                Reparameterized time `tau` in [0, 1] of each sequence, or of each token: 0 is noise, 1 is data. Known tokens have
                time 1.
            target_timesteps (`torch.FloatTensor` of the shape of `timesteps`, *optional*):
                Reparameterized target time, at least `timesteps`. Required by flow maps, ignored by an FLM.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens to attend to, 0 for padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                States `x @ E`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Clean tokens, for the cross-entropy. Positions with -100 are ignored; use it for known tokens. In training mode with
                `labels`, no logits are returned, because they would need tokens times vocabulary of memory.
            estimate (`torch.FloatTensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                Expected embedding of the clean tokens, `probabilities @ model.state_embedding`, for a model with
                `config.self_conditioning`.
            kwargs:
                `num_items_in_batch`, the divisor of the summed loss (by default the number of labels); and arguments of the
                attention function.

        Returns:
            [`FLMOutput`]

        Raises:
            `ValueError`: if these arguments do not go together, or times are not in [0, 1].

        Example:

        ```python
        >>> model = FLMModel(FLMConfig(vocab_size=100, hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
        >>> input_ids = torch.randint(100, (2, 16))
        >>> tau = torch.rand(2)
        >>> state = model.make_state(input_ids, tau, noise=torch.randn(2, 16, 64))
        >>> output = model(inputs_embeds=state, timesteps=tau, labels=input_ids)
        >>> output.logits.shape
        torch.Size([2, 16, 100])
        ```
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either `input_ids` (clean tokens) or `inputs_embeds` (states), not both.")
        for name in _OF_OTHER_BATCHES:
            value = kwargs.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(
                    f"`{name}` is not supported: each row of a batch is one whole sequence, with positions from 0 and attention in "
                    "both directions. Pad sequences instead of packing them, and pass an `attention_mask`."
                )
        size = sum(self.state_sizes)
        if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != size):
            raise ValueError(
                f"`inputs_embeds` must have shape (batch_size, sequence_length, {size}), got {tuple(inputs_embeds.shape)}: make "
                "states with `model.make_state(input_ids)`."
            )
        shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
        if timesteps is None:
            raise ValueError(
                "Pass `timesteps`, the reparameterized time tau in [0, 1] of each sequence, or of each token. To train a model, "
                "use `FLMTrainer` instead of `Trainer`."
            )
        for name, times in (("timesteps", timesteps), ("target_timesteps", target_timesteps)):
            if times is None:
                continue
            got = tuple(times.shape) if isinstance(times, torch.Tensor) else f"`{times!r}`"
            if got not in (shape[:1], shape):
                raise ValueError(
                    f"`{name}` must be a tensor of shape {shape[:1]}, one time per sequence, or {shape}, one per token, got {got}."
                )
        if target_timesteps is not None and target_timesteps.shape != timesteps.shape:
            raise ValueError(
                f"`target_timesteps` must have the shape of `timesteps`, {tuple(timesteps.shape)}, got "
                f"{tuple(target_timesteps.shape)}."
            )
        if labels is not None and inputs_embeds is None:
            raise ValueError(
                "`labels` need noised states, because clean tokens leave nothing to learn: pass `inputs_embeds=model.make_state("
                "input_ids, timesteps, noise)` instead of `input_ids`. To train a model, use `FLMTrainer`."
            )
        if has_values(timesteps):  # this check waits for the device
            end = timesteps if target_timesteps is None else target_timesteps
            if not ((timesteps >= 0) & (timesteps <= end) & (end <= 1)).all():
                raise ValueError(
                    "`timesteps` must be in [0, 1], and `target_timesteps` at least `timesteps` and at most 1: they are "
                    "reparameterized times, 0 for noise and 1 for data."
                )
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        state = self.make_state(input_ids) if inputs_embeds is None else inputs_embeds
        features = self.features(
            state, timesteps, target_timesteps, attention_mask, estimate, return_dict=True, **kwargs
        )
        hidden_states = features.last_hidden_state
        losses = {}
        if labels is not None:
            mask = (labels != -100).to(hidden_states.device, torch.float32)
            total, token_losses = self.cross_entropy_loss(labels, mask, hidden_states, timesteps, target_timesteps)
            count = mask.sum() if num_items_in_batch is None else num_items_in_batch
            losses["loss"] = total / torch.as_tensor(count, device=total.device).clamp(min=1)
            losses["token_losses"] = token_losses.to(mask.device) * mask
        with_predictions = labels is None or not self.training
        predictions = self.predictions(hidden_states, timesteps, target_timesteps) if with_predictions else {}
        # Built at once: fields that are set later would come last in tuples and exported programs.
        return FLMOutput(**losses, **predictions, **features)
