# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Flow-based language models."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from .backbone_flm import (
    FLMAttention,
    FLMLayer,
    FLMLayerNorm,
    FLMLossWeighting,
    FLMTimeEmbedding,
    apply_linear,
    modulate,
    modulations,
    rotary_embedding,
)
from .configuration_flm import FLMConfig, FMLMConfig, FMLMTwoNetworkConfig
from .flow import correction_coefficient, expand_times, interpolate
from .generation_config_flm import FLMGenerationConfig
from .generation_flm import FLMGenerationMixin
from .joint_noise import JointNoise
from .likelihood_flm import FLMLikelihoodMixin, FLMLikelihoodOutput
from .losses import (
    LossFunction,
    head_loss,
    layer_loss,
    softcap_logits,
    softmax_cross_entropy,
    softmax_divergence,
)
from .pipeline_flm import FLMPipeline  # noqa: F401  # transformers copies what is imported here into a repository
from .posterior_flm import Posterior, times_of
from .time_reparameterization import TimeMap, build_time_map
from .utils_flm import chunks, raise_recompile_limit


@dataclass
class FLMOutput(ModelOutput):
    """
    Output of [`FLMModel`], [`FMLMModel`] and [`FMLMTwoNetworkModel`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            The mean over the tokens of the cross-entropy of the denoiser to the clean tokens, in nats.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*, returned by models that are a softmax):
            The unnormalized log-probabilities of the clean tokens, after the cap of `config.final_logit_softcapping`:
            `softmax(logits)` is the denoiser `D_t` or the two-time denoiser.
        probabilities (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*, returned by [`FMLMTwoNetworkModel`]):
            The two-time denoiser, which may leave the simplex.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The input of the head, after the final modulated normalization. For [`FMLMTwoNetworkModel`] those of both
            heads, concatenated.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            The states of shape `(batch_size, sequence_length, hidden_size)` that enter each block, and the last one.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            The attention weights of shape `(batch_size, num_heads, sequence_length, sequence_length)` of each block.
        token_losses (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*, returned when `labels` is provided):
            The cross-entropy at each token; without gradient, and 0 where labels are -100.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    probabilities: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    token_losses: torch.FloatTensor | None = None


class FLMPreTrainedModel(PreTrainedModel):
    """
    What flow-based language models have in common: weight initialization, what the backbone supports, states, and `forward`
    and `posterior` in terms of what a concrete model defines: `embeddings`, `encode`, `predict` and `loss`.

    The sampler and guidance use `state_embedding`, `state_sizes`, `posterior`, `time_map` and `config`.
    """

    config: FLMConfig
    generation_config_class = FLMGenerationConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["FLMLayer"]
    _keep_in_fp32_modules_strict = ["lm_head", "norm", "norm1", "norm2", "time_embedding", "loss_weighting"]
    _keep_in_fp32_modules = [".*lm_head", ".*time_embedding", ".*loss_weighting"]  # what quantization leaves as it is
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FLMLayer, "attentions": FLMAttention}

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        # Silently dropping the softcap would change what the model computes. Where nothing was asked for, transformers
        # takes this as the sign to choose "eager".
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
        """What starts at zero: blocks as the identity, predictions as the uniform distribution."""
        owners = [module for module in self.modules() if isinstance(module, (FLMLayer, FLMModel))]
        heads = [module.lm_head for module in owners if isinstance(module, FLMModel)]
        return [module.modulation for module in owners] + heads

    # What a concrete model defines

    @property
    def embeddings(self) -> list[nn.Embedding]:
        """The token embedding of each of the model's networks."""
        raise NotImplementedError

    def encode(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The backbone: everything before the head.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): Noised states.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                The reparameterized times of the states; 1 where tokens are known.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): The times to go to, for flow maps.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for real positions.

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
        The head: the two-time denoiser \\(\delta_{s,t}\\), for what `encode` returned or a chunk of its positions.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_positions, embedding_size)`): The input of the head.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_positions)`): As for `encode`.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): As for `encode`.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*): Changes the logits, see `posterior`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`, in float32.
        """
        raise NotImplementedError

    def loss(
        self,
        divergence: str,
        target: torch.LongTensor | Posterior,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The loss of the two-time denoiser, which is never held whole.

        Args:
            divergence (`str`): `"cross_entropy"`, `"kl"` or `"squared_error"`, see [`~losses.softmax_divergence`].
            target (`torch.LongTensor` of shape `(batch_size, sequence_length)`, or [`~posterior_flm.Posterior`]):
                Clean tokens, or distributions.
            token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): What the loss of each token counts.
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): From `encode`.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`): As for `encode`.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): As for `encode`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, and the losses without weights and gradient.
        """
        raise NotImplementedError

    def log_loss_weight(self, tau_s: torch.Tensor) -> torch.Tensor | None:
        """The learned logarithm of the weight of the loss, of the shape of the times, for models that have one."""
        return None

    # Shared by all models

    @property
    def state_embedding(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(vocab_size, embedding_size)`: the embedding E in the states `x @ E`."""
        weights = [self.embed_vocabulary(embedding) for embedding in self.embeddings]
        if len(weights) == 1:
            return weights[0]
        return torch.cat([weight.to(weights[0].device) for weight in weights], dim=1)

    @property
    def state_sizes(self) -> list[int]:
        """How many of the columns of a state belong to each of the model's networks."""
        return [self.config.hidden_size for _ in self.embeddings]

    def embed_vocabulary(self, embedding: nn.Embedding) -> torch.Tensor:
        """
        The weight of an embedding, by a call of the module where it is not there otherwise: adapters add to it, and what
        `device_map` offloads or FSDP shards is whole only during a call.
        """
        weight = embedding.weight
        # By its `forward`, as FSDP derives classes that have the same
        is_plain = type(embedding).forward is nn.Embedding.forward and type(weight) is nn.Parameter
        if is_plain and weight.device.type != "meta":
            return weight
        device = "cpu" if weight.device.type == "meta" else weight.device
        return embedding(torch.arange(self.config.vocab_size, device=device))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings[0]

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            "The size of the vocabulary defines the times and the noise of the model, which would have to be trained anew: "
            "build a model with another `vocab_size`."
        )

    def save_pretrained(self, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`]. `AutoModelForCausalLM` and `AutoModelForMaskedLM` load the same
        model as `AutoModel`, for those who look for a text generator there.
        """
        name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
        auto_classes = dict.fromkeys(("AutoModelForCausalLM", "AutoModelForMaskedLM"), name)
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_classes}
        super().save_pretrained(*args, **kwargs)

    def compile_regions(self, **options):
        """
        Compiles the blocks, and the divergences of those networks that are a softmax, for all methods of this model. What
        is between them is left to wrappers such as FSDP, and takes little time. To compile a step of `generate` whole, pass
        it a `compile_config`. Raises `torch._dynamo.config.recompile_limit` to 64.

        Args:
            options: Arguments of `torch.compile`, such as `backend`, `mode` or `fullgraph`.
        """
        # One code for all networks in training and evaluation, with and without padding: each is a graph of its own.
        raise_recompile_limit()
        compute = torch.compile(FLMLayer.compute, **options)
        for module in self.modules():
            if isinstance(module, FLMLayer):
                module.compiled = compute
            elif isinstance(module, FLMModel):
                module.softmax_divergence = torch.compile(softmax_divergence, **options)
                module.softmax_cross_entropy = torch.compile(softmax_cross_entropy, **options)

    def make_state(
        self,
        input_ids: torch.LongTensor,
        tau: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        joint_noise: JointNoise | None = None,
        time_map: TimeMap | None = None,
    ) -> torch.Tensor:
        """
        The state of clean tokens, or of noised ones; in float32 also under autocast, and differentiable in the embeddings.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Clean tokens.
            tau (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`, *optional*):
                The reparameterized times; at 1 a token is clean.
            noise (`torch.Tensor` of shape `(batch_size, sequence_length, noise_size)`, *optional*):
                Standard normal variables. For one network by itself `noise_size` is `min(vocab_size, hidden_size)`, see
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
            return interpolate(noise @ factor.to(noise), clean, t)

    def posterior(
        self,
        state: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
    ) -> Posterior:
        r"""
        The two-time denoiser \\(\delta_{s,t}\\), read a chunk of positions at a time.

        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`): The states at time `s`.
            tau_s (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                The reparameterized times of the states; 1 where tokens are known.
            tau_t (`torch.Tensor` of the shape of `tau_s`, *optional*): The times to go to, for flow maps.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for real positions.
            logits_processor ([`~transformers.LogitsProcessorList`], *optional*):
                Changes the logits. It is called once per chunk, with scores of shape `(num_tokens, vocab_size)` and
                an empty prefix.

        Returns:
            [`~posterior_flm.Posterior`]: probabilities of the clean tokens, in float32, which for an [`FMLMTwoNetworkModel`]
            may leave the simplex.
        """
        hidden_states = self.encode(state, tau_s, tau_t, attention_mask)

        def probabilities(chunk: slice) -> torch.Tensor:
            times = (None if tau is None else times_of(tau, chunk) for tau in (tau_s, tau_t))
            return self.predict(hidden_states[:, chunk], *times, logits_processor)

        return Posterior(probabilities, self.chunks(state), state.device)

    def chunks(self, state: torch.Tensor) -> list[slice]:
        """Chunks of positions for which probabilities can be held, see [`~utils_flm.chunks`]."""
        return chunks(*state.shape[:2], self.config.vocab_size, state.device)

    def _as_target(
        self, divergence: str, target: torch.LongTensor | Posterior, hidden_states: torch.Tensor
    ) -> torch.LongTensor | Posterior:
        """Tokens stay tokens where only how likely they are counts: for one token "kl" is the cross-entropy."""
        if not isinstance(target, torch.Tensor) or divergence != "squared_error":
            return target
        tokens = target.to(hidden_states.device)
        return Posterior.of_tokens(tokens, self.config.vocab_size, self.chunks(hidden_states))

    def head_outputs(
        self, hidden_states: torch.Tensor, tau_s: torch.Tensor, tau_t: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What `forward` returns of the head, by name."""
        return {"probabilities": self.predict(hidden_states, tau_s, tau_t)}

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        timesteps: torch.FloatTensor | None = None,
        target_timesteps: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> FLMOutput:
        r"""
        Denoises states, which are given as `inputs_embeds`, or clean tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Clean tokens. To noise them, see [`~FLMPreTrainedModel.make_state`].
            timesteps (`torch.FloatTensor` of shape `(batch_size,)` or `(batch_size, sequence_length)`):
                The reparameterized time `tau` in [0, 1] of each text, or of each token: 0 is noise, 1 is text. Known tokens
                have the time 1.
            target_timesteps (`torch.FloatTensor` of the shape of `timesteps`, *optional*):
                The reparameterized time to go to, at least `timesteps`. Flow maps need it, an FLM ignores it.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for positions that are attended to, 0 for padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
                States `x @ E`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Clean tokens to compute the cross-entropy to; positions with -100 do not count, which known tokens should have.
                In training mode with `labels`, the logits are left out, which are as many as tokens times vocabulary.
            kwargs:
                `num_items_in_batch`, what to divide the summed loss by where a batch is one of several; and what the attention
                function takes.

        Returns:
            [`FLMOutput`]

        Raises:
            `ValueError`: where these arguments do not go together, or times are not in [0, 1].

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
            raise ValueError("Pass either `input_ids` (clean tokens) or `inputs_embeds` (states), and not both.")
        shape = tuple((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
        if timesteps is None:
            raise ValueError(
                "Pass `timesteps`, the reparameterized time tau in [0, 1] of each text, or of each token."
            )
        for name, times in (("timesteps", timesteps), ("target_timesteps", target_timesteps)):
            if times is None:
                continue
            got = tuple(times.shape) if isinstance(times, torch.Tensor) else f"`{times!r}`"
            if got not in (shape[:1], shape):
                raise ValueError(
                    f"`{name}` must be a tensor of shape {shape[:1]}, one time per text, or {shape}, one per token, got {got}."
                )
        if target_timesteps is not None and target_timesteps.shape != timesteps.shape:
            raise ValueError(
                f"`target_timesteps` must have the shape of `timesteps`, {tuple(timesteps.shape)}, got "
                f"{tuple(target_timesteps.shape)}."
            )
        if labels is not None and inputs_embeds is None:
            raise ValueError(
                "`labels` need noised states, as clean tokens leave nothing to learn: pass `inputs_embeds=model.make_state("
                "input_ids, timesteps, noise)` in the place of `input_ids`."
            )
        if not torch.compiler.is_compiling():  # what follows waits for the device
            end = timesteps if target_timesteps is None else target_timesteps
            if not ((timesteps >= 0) & (timesteps <= end) & (end <= 1)).all():
                raise ValueError(
                    "`timesteps` must be in [0, 1], and `target_timesteps` at least `timesteps` and at most 1: they are "
                    "reparameterized times, 0 for noise and 1 for text."
                )
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        state = self.make_state(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = self.encode(state, timesteps, target_timesteps, attention_mask, **kwargs)
        output = FLMOutput(last_hidden_state=hidden_states)
        if labels is not None:
            mask = (labels != -100).to(hidden_states.device, torch.float32)
            total, losses = self.loss("cross_entropy", labels, mask, hidden_states, timesteps, target_timesteps)
            count = mask.sum() if num_items_in_batch is None else num_items_in_batch
            output.loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
            output.token_losses = losses.to(mask.device) * mask
        if labels is None or not self.training:
            for name, value in self.head_outputs(hidden_states, timesteps, target_timesteps).items():
                output[name] = value
        return output


class FLMModel(FLMPreTrainedModel, FLMGenerationMixin, FLMLikelihoodMixin):
    r"""
    A flow-based language model: a diffusion transformer \\(D_t(x)\\) that is shown a noised text and predicts, for every
    position at once, the distribution of the clean token. [`~FLMModel.generate`] follows the flow of this denoiser from
    noise to text.

    Args:
        config ([`FLMConfig`]): The configuration. The weights are initialized at random; use
            [`~PreTrainedModel.from_pretrained`] to load trained ones.
    """

    def __init__(self, config: FLMConfig):
        if config.model_type == "fmlm" and type(self) is FLMModel:
            raise TypeError("`config` must be an `FLMConfig`, got an `FMLMConfig`: build an `FMLMModel` with it.")
        super().__init__(config)
        self.time_map = build_time_map(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_embedding = FLMTimeEmbedding(config)
        self.layers = nn.ModuleList([FLMLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = FLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        # Plain linear layers, which adapters and quantization know
        self.modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def embeddings(self) -> list[nn.Embedding]:
        return [self.embed_tokens]

    def conditioning_times(self, tau: torch.Tensor) -> torch.Tensor:
        """The times that the network is told: that of each token, or the earliest of each text."""
        return tau if tau.dim() == 1 or self.config.per_token_timesteps else tau.amin(dim=1)

    def embed_times(self, tau_s: torch.Tensor, tau_t: torch.Tensor | None) -> torch.Tensor:
        """The time embedding, of shape `(..., conditioning_size)`. An Euler step does not depend on its length."""
        return self.time_embedding(self.conditioning_times(tau_s))

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, **kwargs):
        config = self.config
        conditioning = F.silu(self.embed_times(tau_s, tau_t))
        conditioning = conditioning[:, None] if conditioning.dim() == 2 else conditioning
        hidden_states = state.to(self.dtype)
        attention_mask = create_bidirectional_mask(
            config=config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        position_embeddings = rotary_embedding(
            length=state.shape[1],
            head_dim=config.hidden_size // config.num_attention_heads,
            theta=config.rope_parameters["rope_theta"],
            device=state.device,
        )
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                conditioning,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        shift, scale = modulations(self.modulation, conditioning, 2)
        return modulate(self.norm(hidden_states), shift, scale)

    softmax_divergence = staticmethod(softmax_divergence)
    softmax_cross_entropy = staticmethod(softmax_cross_entropy)

    def loss(self, divergence, target, token_weights, hidden_states, tau_s, tau_t=None):
        softcap = self.config.final_logit_softcapping
        target = self._as_target(divergence, target, hidden_states)

        def function(outputs, chunk, workspace):
            if isinstance(target, torch.Tensor):
                return self.softmax_cross_entropy(outputs, target[:, chunk].to(outputs.device), softcap, workspace)
            return self.softmax_divergence(divergence, outputs, target.probabilities(chunk), softcap, workspace)

        return self.head_loss(function, token_weights, hidden_states)

    def head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The outputs of the head, in float32 also under autocast."""
        # Contiguous, as a chunk of positions is not: it becomes one product of matrices, and not one for each sequence.
        return apply_linear(self.lm_head, hidden_states.contiguous()).float()

    def head_loss(
        self, function: LossFunction, token_weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The weighted sum of losses of the head's outputs, a chunk of positions at a time. The weights of the head are read here,
        so FSDP must gather them for a call of this method.

        Args:
            function (`Callable`): See [`~losses.head_loss`].
            token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Weight of each token's loss.
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): From `encode`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, and the losses without weights and gradient.
        """
        layer = self.lm_head
        is_linear = type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)
        if is_linear and type(layer.weight) is nn.Parameter:
            return head_loss(function, token_weights, hidden_states, layer.weight, layer.bias)
        # The layer has adapters, or its weights are quantized or offloaded: call it.
        parameters, vocab_size = layer.parameters(), self.config.vocab_size
        return layer_loss(function, token_weights, hidden_states, self.head, parameters, vocab_size)

    def logits(self, hidden_states: torch.Tensor, logits_processor: LogitsProcessorList | None = None) -> torch.Tensor:
        """The capped and processed logits of what `encode` returned, or of a chunk of its positions, in float32."""
        logits = softcap_logits(self.head(hidden_states), self.config.final_logit_softcapping)
        if logits_processor:
            scores = logits.flatten(0, 1)
            prefix = torch.empty((scores.shape[0], 0), dtype=torch.long, device=scores.device)
            logits = logits_processor(prefix, scores).view_as(logits)
        return logits

    def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
        return self.logits(hidden_states, logits_processor).softmax(dim=-1)

    def head_outputs(self, hidden_states, tau_s, tau_t):
        return {"logits": self.logits(hidden_states)}


class FMLMModel(FLMModel):
    r"""
    A flow map language model: one network \\(\delta_{s,t}(x)\\) with two time embeddings, which jumps from time `s` to
    any later time `t` at once. [`~FMLMModel.generate`] takes a single step unless told otherwise.

    Args:
        config ([`FMLMConfig`]): The configuration. The weights are initialized at random; use
            [`~FMLMModel.from_flm`] to start from an FLM, or [`~PreTrainedModel.from_pretrained`] to load trained ones.
    """

    config: FMLMConfig

    def __init__(self, config: FMLMConfig):
        if config.model_type == "flm":
            raise TypeError(
                "`config` must be an `FMLMConfig`, got an `FLMConfig`: to start from a trained FLM use "
                "`FMLMModel.from_flm(flm)`."
            )
        super().__init__(config)
        self.target_time_embedding = FLMTimeEmbedding(config)
        self.loss_weighting = FLMLossWeighting(config) if config.learned_loss_weighting else None
        self.generation_config.num_steps = 1
        self.post_init()

    @classmethod
    def from_flm(cls, teacher: FLMModel, **config_overrides) -> "FMLMModel":
        r"""
        A flow map that starts from a trained FLM: its weights are copied, and as the last layer of the second time
        embedding is zero, \\(\delta_{s,t}\\) is the teacher's \\(D_s\\) for every `t`.

        Args:
            teacher ([`FLMModel`]): The trained FLM.
            config_overrides: Settings of [`FMLMConfig`] that differ from the teacher's, such as
                `learned_loss_weighting` or `dropout`.

        Returns:
            [`FMLMModel`], on the device of the teacher and in float32, in which it is to be trained.
        """
        check_is_flm(teacher)
        model = cls(flow_map_config(cls.config_class, teacher, config_overrides))
        load_network(model, teacher.state_dict(), config_overrides)
        return model.to(teacher.device)

    @classmethod
    def from_masked(cls, masked_model: FLMModel, **config_overrides) -> "FMLMModel":
        r"""
        A flow map in any order (FMLM+) that starts from a masked diffusion model on the same network, whose last token is the
        mask. Its weights are copied without those of the mask. As it does not know times, the flow map starts without, too: the
        last layers of its time embeddings are constant.

        Args:
            masked_model ([`FLMModel`]): The masked model, which is run at the time 0.
            config_overrides: Settings of [`FMLMConfig`] that differ from the masked model's. By default the flow map is told
                the time of each token, without reparameterization.

        Returns:
            [`FMLMModel`], on the device of the masked model and in float32, in which it is to be trained.
        """
        check_is_flm(masked_model, "masked_model")
        vocab_size = masked_model.config.vocab_size - 1
        any_order = {
            "per_token_timesteps": True,
            "time_reparameterization": None,
            "vocab_size": vocab_size,
        }
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(masked_model.config, name) == vocab_size:
                any_order[name] = None  # it is the mask
        model = cls(flow_map_config(cls.config_class, masked_model, {**any_order, **config_overrides}))
        if model.config.vocab_size != vocab_size:
            raise ValueError(f"`vocab_size` must be {vocab_size}, that of `masked_model` without the mask.")
        sized = ("embed_tokens.", "lm_head.")
        weights = masked_model.state_dict()
        weights = {name: value[:vocab_size] if name.startswith(sized) else value for name, value in weights.items()}
        load_network(model, weights, config_overrides)
        with torch.no_grad():
            start = masked_model.time_embedding(torch.zeros(1, device=masked_model.device))[0]
            model.time_embedding.linear_2.weight.zero_()
            model.time_embedding.linear_2.bias.copy_(start)
        return model.to(masked_model.device)

    def embed_times(self, tau_s, tau_t):
        if tau_t is None:
            raise ValueError("Pass `target_timesteps`, the reparameterized time that each text is to go to.")
        target_times = self.conditioning_times(tau_t)
        return self.time_embedding(self.conditioning_times(tau_s)) + self.target_time_embedding(target_times)

    def log_loss_weight(self, tau_s):
        return None if self.loss_weighting is None else self.loss_weighting(self.conditioning_times(tau_s))


class FMLMTwoNetworkModel(FLMPreTrainedModel, FLMGenerationMixin):
    r"""
    A flow map made of two networks, the first stage of the paper's distillation: a frozen flow \\(D_s\\), and a
    correction network \\(g_{s,t}\\) with raw outputs,
    \\(\delta_{s,t}(x) = D_s(x) + \tfrac12 (t-s)(1-s)\, g_{s,t}(x)\\).

    Its state is the concatenation of the states of its networks, which see the same noise.

    Args:
        config ([`FMLMTwoNetworkConfig`]): The configuration of both networks.
    """

    config: FMLMTwoNetworkConfig
    _can_record_outputs = {}  # the layers of two networks would be one sequence

    def __init__(self, config: FMLMTwoNetworkConfig):
        super().__init__(config)
        self.time_map = build_time_map(config)
        self.flow = FLMModel(config).requires_grad_(False)
        self.correction = FMLMModel(config)
        self.generation_config.num_steps = 1
        self.post_init()

    @classmethod
    def from_flm(cls, teacher: FLMModel, **config_overrides) -> "FMLMTwoNetworkModel":
        """
        The trained FLM as the flow, and a correction that has its weights but for a head of zeros, so that the model
        starts as the teacher.

        Args:
            teacher ([`FLMModel`]): The trained FLM.
            config_overrides: Settings of [`FMLMTwoNetworkConfig`] that differ from the teacher's. As in the paper,
                `learned_loss_weighting` is on by default.

        Returns:
            [`FMLMTwoNetworkModel`], on the device of the teacher and in float32, in which it is to be trained.
        """
        config_overrides.setdefault("learned_loss_weighting", True)
        correction = FMLMModel.from_flm(teacher, **config_overrides)
        nn.init.zeros_(correction.lm_head.weight)
        nn.init.zeros_(correction.lm_head.bias)
        model = cls(flow_map_config(cls.config_class, teacher, config_overrides))
        model.flow.load_state_dict(teacher.state_dict())
        model.correction.load_state_dict(correction.state_dict())
        return model.to(teacher.device)

    def train(self, mode: bool = True) -> "FMLMTwoNetworkModel":
        super().train(mode)
        self.flow.eval().requires_grad_(False)  # frozen, also after `from_pretrained`
        return self

    @property
    def embeddings(self) -> list[nn.Embedding]:
        return [self.flow.embed_tokens, self.correction.embed_tokens]

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, **kwargs):
        flow_state, correction_state = state.chunk(2, dim=-1)
        flow = self.flow.encode(flow_state, tau_s, None, attention_mask, **kwargs)
        correction = self.correction.encode(correction_state, tau_s, tau_t, attention_mask, **kwargs)
        return torch.cat([flow, correction.to(flow.device)], dim=-1)

    def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
        flow_states, correction_states = hidden_states.chunk(2, dim=-1)
        logits = self.flow.logits(flow_states, logits_processor)
        correction = self.correction.head(correction_states).to(logits.device)  # not logits: no softcap
        scale = self._correction_scale(tau_s, tau_t, logits)
        # What a processor ruled out stays so.
        return logits.softmax(dim=-1) + scale * correction.masked_fill(logits == -torch.inf, 0.0)

    def _correction_scale(self, tau_s: torch.Tensor, tau_t: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
        return expand_times(correction_coefficient(s, t), outputs).to(outputs.device)

    def loss(self, divergence, target, token_weights, hidden_states, tau_s, tau_t=None):
        if not isinstance(target, torch.Tensor) and divergence != "squared_error":
            raise ValueError(
                f"`divergence` must be 'squared_error' for a model that is not a softmax, got {divergence!r}."
            )
        target = self._as_target(divergence, target, hidden_states)
        flow_states, correction_states = hidden_states.chunk(2, dim=-1)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.flow.parameters()):
            raise ValueError("The flow of a two-network model is frozen, and its `requires_grad` must stay `False`.")

        def function(outputs, chunk, workspace):
            scale = self._correction_scale(times_of(tau_s, chunk), times_of(tau_t, chunk), outputs)
            flow = self.flow.predict(flow_states[:, chunk], times_of(tau_s, chunk)).to(outputs.device)
            delta = flow + scale * outputs.float()
            if not isinstance(target, torch.Tensor):
                difference = delta - target.probabilities(chunk)
                losses, gradient = difference.square().sum(dim=-1), 2 * difference
            else:
                labels = target[:, chunk].to(outputs.device)
                labels = labels.masked_fill(labels == -100, 0).unsqueeze(-1)
                chosen = delta.gather(-1, labels)
                tiny = torch.finfo(chosen.dtype).tiny  # as the correction may leave the simplex
                losses = -chosen.clamp(min=tiny).log().squeeze(-1)
                gradient = torch.zeros_like(delta).scatter(-1, labels, torch.where(chosen > tiny, -1 / chosen, 0.0))
            return losses, (scale * gradient).to(outputs.dtype)

        return self.correction.head_loss(function, token_weights, correction_states)

    def log_loss_weight(self, tau_s):
        return self.correction.log_loss_weight(tau_s)

    def log_likelihood_bound(self, *args, **kwargs) -> FLMLikelihoodOutput:
        """That of the flow, which the model is where both times are equal: see [`FLMModel.log_likelihood_bound`]."""
        return self.flow.log_likelihood_bound(*args, **kwargs)


def load_network(model: FMLMModel, weights: dict[str, torch.Tensor], config_overrides: dict):
    """Loads the weights of an FLM into a flow map of the same sizes, which does not depend yet on the time to go to."""
    new = ("target_time_embedding.", "loss_weighting.")
    # What peft and quantization make of the names
    changed = [name for name in weights if ".base_layer." in name or name.split(".")[-1] not in ("weight", "bias")]
    if changed:
        raise ValueError(
            f"The model to start from has weights that a plain one does not have, such as {changed[0]}: merge its adapters first "
            "(`merge_and_unload` of the `PeftModel`), or load it without quantization."
        )
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(new)}
    if expected != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"`config_overrides` must leave all sizes as they are, got {config_overrides}.")
    model.load_state_dict(weights, strict=False)
    nn.init.zeros_(model.target_time_embedding.linear_2.weight)
    nn.init.zeros_(model.target_time_embedding.linear_2.bias)


def check_is_flm(teacher: PreTrainedModel, argument: str = "teacher"):
    """Raises a `TypeError` where a flow map cannot start from a model. By its name, as remote code has other classes."""
    name = type(teacher).__name__
    if name != "FLMModel":
        hints = {
            "FMLMModel": " A flow map is a student already: pass it as `model`, or as `--student`.",
            "FMLMTwoNetworkModel": f" Pass its flow, `{argument}.flow`.",
        }
        merge = f" Merge its adapters first, `{argument}.merge_and_unload()`." if name.startswith("Peft") else ""
        raise TypeError(f"`{argument}` must be an `FLMModel`, got `{name}`.{hints.get(name, merge)}")


def flm_settings(config: FLMConfig) -> dict:
    """What of a configuration is a setting of every [`FLMConfig`]: sizes, tokens, times and caps."""
    not_settings = ("architectures", "dtype", "model_type", "transformers_version", "_name_or_path")
    names = FLMConfig().to_dict().keys() - set(not_settings)
    return {name: value for name, value in config.to_dict().items() if name in names}


def flow_map_config(config_class: type[FMLMConfig], teacher: FLMModel, overrides: dict) -> FMLMConfig:
    """The configuration of a flow map with the sizes, the tokens and the attention of its teacher."""
    if unknown := sorted(overrides.keys() - config_class().to_dict().keys()):
        raise ValueError(f"{config_class.__name__} has no setting {', '.join(unknown)}.")
    config = config_class(**{**flm_settings(teacher.config), **overrides})
    config._attn_implementation = teacher.config._attn_implementation
    return config


__all__ = ["FLMModel", "FLMPreTrainedModel", "FMLMModel", "FMLMTwoNetworkModel"]
