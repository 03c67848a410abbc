# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Flow-based language models: FLM, flow map, and a flow map of two networks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from .backbone_flm import (
    FLMLayer,
    FLMLayerNorm,
    FLMLossWeighting,
    FLMTimeEmbedding,
    apply_linear,
    modulate,
    modulations,
    rotary_embedding,
)
from .base_flm import FLMOutput, FLMPreTrainedModel
from .configuration_flm import FLMConfig, FMLMConfig, FMLMTwoNetworkConfig
from .flow import correction_coefficient, expand_times
from .generation_config_flm import FLMGenerationConfig
from .generation_flm import FLMGenerationMixin
from .likelihood_flm import FLMLikelihoodMixin, FLMLikelihoodOutput
from .losses import LossFunction, layer_loss, linear_loss, softcap_logits
from .pipeline_flm import FLMPipeline  # noqa: F401  # transformers copies what is imported here into a repository
from .posterior_flm import times_of
from .time_reparameterization import build_time_map
from .utils_flm import may_overwrite


class FLMModel(FLMPreTrainedModel, FLMGenerationMixin, FLMLikelihoodMixin):
    r"""
    A flow-based language model: a diffusion transformer \\(D_t(x)\\) that takes a noised sequence and predicts the
    distributions of the clean tokens at all positions at once. [`~FLMModel.generate`] follows the flow of this denoiser from
    noise to text.

    Args:
        config ([`FLMConfig`]): The configuration. Weights are initialized at random; use
            [`~PreTrainedModel.from_pretrained`] to load a trained model.
    """

    def __init__(self, config: FLMConfig):
        if config.model_type == "fmlm" and type(self) is FLMModel:
            raise TypeError("`config` must be an `FLMConfig`, got an `FMLMConfig`: build an `FMLMModel` with it.")
        super().__init__(config)
        self.time_map = build_time_map(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        size = config.hidden_size
        self.self_conditioning = nn.Linear(size, size, bias=False) if config.self_conditioning else None
        self.time_embedding = FLMTimeEmbedding(config)
        self.layers = nn.ModuleList([FLMLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = FLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        # Plain linear layers, for adapters and quantization
        self.modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def embeddings(self) -> list[nn.Embedding]:
        return [self.embed_tokens]

    def _layers_of_zeros(self) -> list[nn.Module]:
        return [*super()._layers_of_zeros(), self.modulation, self.lm_head, self.self_conditioning]

    def conditioning_times(self, tau: torch.Tensor) -> torch.Tensor:
        """Times the network is conditioned on: one per token, or the smallest of each sequence."""
        return tau if tau.dim() == 1 or self.config.per_token_timesteps else tau.amin(dim=1)

    def embed_times(self, tau_s: torch.Tensor, tau_t: torch.Tensor | None) -> torch.Tensor:
        """Time embedding, of shape `(..., conditioning_size)`. A denoiser does not depend on the target time."""
        return self.time_embedding(self.conditioning_times(tau_s))

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None, **kwargs):
        config = self.config
        if estimate is not None and self.self_conditioning is None:
            raise ValueError("`estimate` is for a model with `config.self_conditioning`.")
        conditioning = F.silu(self.embed_times(tau_s, tau_t))
        conditioning = conditioning[:, None] if conditioning.dim() == 2 else conditioning
        hidden_states = state.to(self.dtype)
        if estimate is not None:
            hidden_states = hidden_states + self.self_conditioning(estimate.to(self.dtype))
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

    def cross_entropy_loss(self, labels, token_weights, hidden_states, tau_s, tau_t=None):
        softcap = self.config.final_logit_softcapping

        def losses_and_gradients(outputs, chunk, workspace):
            return self.softmax_cross_entropy(outputs, labels[:, chunk].to(outputs.device), softcap, workspace)

        return self.head_loss(losses_and_gradients, token_weights, hidden_states)

    def divergence_loss(self, divergence, target, token_weights, hidden_states, tau_s, tau_t=None):
        softcap = self.config.final_logit_softcapping

        def losses_and_gradients(outputs, chunk, workspace):
            return self.softmax_divergence(divergence, outputs, target.probabilities(chunk), softcap, workspace)

        return self.head_loss(losses_and_gradients, token_weights, hidden_states)

    def head_loss(
        self, function: LossFunction, token_weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weighted sum of losses of the head's outputs, computed one chunk of positions at a time. Reads the weights of the head, so
        FSDP must gather them for a call of this method.

        Args:
            function (`Callable`): See [`~losses.linear_loss`].
            token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Weight of each token's loss.
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): From `encode`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, and the losses without weights and gradient.
        """
        layer = self.lm_head
        is_linear = type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)
        if is_linear and type(layer.weight) is nn.Parameter:
            return linear_loss(function, token_weights, hidden_states, layer.weight, layer.bias)
        # The layer has adapters, or its weights are quantized or offloaded: call it.
        return layer_loss(function, token_weights, hidden_states, layer, self.head_outputs, self.config.vocab_size)

    def head_outputs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of the head without a softcap, in float32 also under autocast."""
        # A chunk of positions is not contiguous, and would become one matrix product per sequence.
        return apply_linear(self.lm_head, hidden_states.contiguous()).float()

    def logits(self, hidden_states: torch.Tensor, logits_processor: LogitsProcessorList | None = None) -> torch.Tensor:
        """Capped and processed logits for the outputs of `encode`, or for a chunk of their positions, in float32."""
        outputs, softcap = self.head_outputs(hidden_states), self.config.final_logit_softcapping
        logits = softcap_logits(outputs, softcap, in_place=may_overwrite(self.lm_head))
        if logits_processor:
            scores = logits.flatten(0, 1)
            prefix = torch.empty((scores.shape[0], 0), dtype=torch.long, device=scores.device)
            logits = logits_processor(prefix, scores).view_as(logits)
        return logits

    def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
        return self.logits(hidden_states, logits_processor).softmax(dim=-1)

    def predictions(self, hidden_states, tau_s, tau_t):
        return {"logits": self.logits(hidden_states)}


class FMLMModel(FLMModel):
    r"""
    A flow map language model: one network \\(\delta_{s,t}(x)\\) with two time embeddings, which moves from time `s` to
    any later time `t` in one step. [`~FMLMModel.generate`] takes one step by default.

    Args:
        config ([`FMLMConfig`]): The configuration. Weights are initialized at random; use
            [`~FMLMModel.from_flm`] to start from an FLM, or [`~PreTrainedModel.from_pretrained`] to load a trained model.
    """

    config: FMLMConfig
    _keep_in_fp32_modules_strict = [*FLMModel._keep_in_fp32_modules_strict, "target_time_embedding"]

    def __init__(self, config: FMLMConfig):
        if config.model_type == "flm":
            raise TypeError(
                "`config` must be an `FMLMConfig`, got an `FLMConfig`: to start from a trained FLM use "
                "`FMLMModel.from_flm(flm)`."
            )
        super().__init__(config)
        self.target_time_embedding = FLMTimeEmbedding(config)
        self.loss_weighting = FLMLossWeighting(config) if config.learned_loss_weighting else None
        set_flow_map_defaults(self.generation_config)
        self.post_init()

    @classmethod
    def from_flm(cls, teacher: FLMModel, **config_overrides) -> "FMLMModel":
        r"""
        Returns a flow map that starts from a trained FLM. The weights are copied, and the last layer of the second time
        embedding is zero, so that \\(\delta_{s,t}\\) is the teacher's \\(D_s\\) for every `t`.

        Args:
            teacher ([`FLMModel`]): The trained FLM.
            config_overrides: Fields of [`FMLMConfig`] that differ from the teacher's, such as
                `learned_loss_weighting` or `dropout`.

        Returns:
            [`FMLMModel`], on the device of the teacher and in float32, for training.
        """
        check_is_flm(teacher)
        model = cls(flow_map_config(cls.config_class, teacher, config_overrides))
        load_network(model, teacher.state_dict(), config_overrides)
        return model.to(teacher.device)

    @classmethod
    def from_masked(cls, masked_model: FLMModel, **config_overrides) -> "FMLMModel":
        r"""
        Returns an any-order flow map (FMLM+) that starts from a masked diffusion model with the same network, whose last token
        is the mask. The weights are copied, except the rows for the mask. The masked model does not depend on time, so the flow
        map starts independent of time as well: the last layers of its time embeddings are constant.

        Args:
            masked_model ([`FLMModel`]): The masked model, which runs at time 0.
            config_overrides: Fields of [`FMLMConfig`] that differ from the masked model's. By default the flow map is
                conditioned on the time of each token, without reparameterization.

        Returns:
            [`FMLMModel`], on the device of the masked model and in float32, for training.
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
            raise ValueError(f"`vocab_size` must be {vocab_size}, the vocabulary of `masked_model` without the mask.")
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
            raise ValueError(
                "Pass `target_timesteps`, the reparameterized target time of each sequence, or of each token."
            )
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

    def __init__(self, config: FMLMTwoNetworkConfig):
        super().__init__(config)
        self.time_map = build_time_map(config)
        self.flow = FLMModel(config).requires_grad_(False)
        self.correction = FMLMModel(config)
        set_flow_map_defaults(self.generation_config)
        self.post_init()

    @classmethod
    def from_flm(cls, teacher: FLMModel, **config_overrides) -> "FMLMTwoNetworkModel":
        """
        Returns a model whose flow is the trained FLM. The correction has the same weights and a head of zeros, so that the model
        starts as the teacher.

        Args:
            teacher ([`FLMModel`]): The trained FLM.
            config_overrides: Fields of [`FMLMTwoNetworkConfig`] that differ from the teacher's. As in the paper,
                `learned_loss_weighting` is on by default.

        Returns:
            [`FMLMTwoNetworkModel`], on the device of the teacher and in float32, for training.
        """
        if teacher.config.self_conditioning:
            raise ValueError(
                "`teacher` has `self_conditioning`, which two networks do not: distill it into an `FMLMModel`."
            )
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

    # Embedding and head of the network that is trained
    def get_input_embeddings(self) -> nn.Embedding:
        return self.correction.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.correction.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.correction.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.correction.set_output_embeddings(new_embeddings)

    def encode(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None, **kwargs):
        return self.features(state, tau_s, tau_t, attention_mask, estimate, **kwargs).last_hidden_state

    def features(self, state, tau_s, tau_t=None, attention_mask=None, estimate=None, **kwargs):
        kwargs["return_dict"] = True
        flow_state, correction_state = state.chunk(2, dim=-1)
        flow = self.flow.features(flow_state, tau_s, None, attention_mask, estimate, **kwargs)  # refuses an estimate
        correction = self.correction.features(correction_state, tau_s, tau_t, attention_mask, **kwargs)

        def both(first: torch.Tensor | None, second: torch.Tensor | None, dim: int = -1) -> torch.Tensor | None:
            return None if first is None else torch.cat([first, second.to(first.device)], dim=dim)

        recorded = {
            name: tuple(both(*pair, dim) for pair in zip(flow[name], correction[name]))
            for name, dim in (("hidden_states", -1), ("attentions", 1))
            if name in flow
        }
        return FLMOutput(last_hidden_state=both(flow.last_hidden_state, correction.last_hidden_state), **recorded)

    def predict(self, hidden_states, tau_s, tau_t=None, logits_processor=None):
        flow_states, correction_states = hidden_states.chunk(2, dim=-1)
        logits = self.flow.logits(flow_states, logits_processor)
        correction = self.correction.head_outputs(correction_states).to(
            logits.device
        )  # no softcap: these are not logits
        scale = self._correction_scale(tau_s, tau_t, logits)
        # Tokens that a processor has excluded stay excluded.
        return logits.softmax(dim=-1) + scale * correction.masked_fill(logits == -torch.inf, 0.0)

    def _correction_scale(self, tau_s: torch.Tensor, tau_t: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        s, t = self.time_map.tau_to_t(tau_s), self.time_map.tau_to_t(tau_t)
        return expand_times(correction_coefficient(s, t), outputs).to(outputs.device)

    def predictions(self, hidden_states, tau_s, tau_t):
        return {"probabilities": self.predict(hidden_states, tau_s, tau_t)}

    def cross_entropy_loss(self, labels, token_weights, hidden_states, tau_s, tau_t=None):
        def losses_and_gradients(delta, chunk):
            chosen_tokens = labels[:, chunk].to(delta.device)
            chosen_tokens = chosen_tokens.masked_fill(chosen_tokens == -100, 0).unsqueeze(-1)
            # The correction may leave the simplex: a distribution is the positive part, normalized.
            tiny = torch.finfo(delta.dtype).tiny
            positive = delta.clamp(min=tiny)
            chosen, total = positive.gather(-1, chosen_tokens), positive.sum(dim=-1, keepdim=True)
            gradient = (1 / total).expand_as(delta).scatter_add(-1, chosen_tokens, -1 / chosen)
            return (total.log() - chosen.log()).squeeze(-1), gradient.masked_fill(delta <= tiny, 0.0)

        return self._correction_loss(losses_and_gradients, token_weights, hidden_states, tau_s, tau_t)

    def divergence_loss(self, divergence, target, token_weights, hidden_states, tau_s, tau_t=None):
        if divergence != "squared_error":
            raise ValueError(
                f"`divergence` must be 'squared_error' for a model that is not a softmax, got {divergence!r}."
            )

        def losses_and_gradients(delta, chunk):
            difference = delta - target.probabilities(chunk)
            return difference.square().sum(dim=-1), 2 * difference

        return self._correction_loss(losses_and_gradients, token_weights, hidden_states, tau_s, tau_t)

    def _correction_loss(
        self,
        function: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        tau_s: torch.Tensor,
        tau_t: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums a loss of the two-time denoiser over chunks. `function` returns losses and their gradients."""
        flow_states, correction_states = hidden_states.chunk(2, dim=-1)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.flow.parameters()):
            raise ValueError("The flow of a two-network model is frozen, and its `requires_grad` must stay `False`.")

        def losses_and_gradients(outputs, chunk, workspace):
            scale = self._correction_scale(times_of(tau_s, chunk), times_of(tau_t, chunk), outputs)
            flow = self.flow.predict(flow_states[:, chunk], times_of(tau_s, chunk)).to(outputs.device)
            losses, gradient = function(flow + scale * outputs.float(), chunk)
            return losses, (scale * gradient).to(outputs.dtype)

        return self.correction.head_loss(losses_and_gradients, token_weights, correction_states)

    def log_loss_weight(self, tau_s):
        return self.correction.log_loss_weight(tau_s)

    def log_likelihood_bound(self, *args, **kwargs) -> FLMLikelihoodOutput:
        """Returns the bound of the flow, which the model equals for equal times, see [`FLMModel.log_likelihood_bound`]."""
        self.flow.generation_config = self.generation_config  # whose BOS token is known
        return self.flow.log_likelihood_bound(*args, **kwargs)


def load_network(model: FMLMModel, weights: dict[str, torch.Tensor], config_overrides: dict):
    """Loads the weights of an FLM into a flow map of the same sizes, which starts independent of the target time."""
    new = ("target_time_embedding.", "loss_weighting.")
    # peft and quantization change the names
    changed = [name for name in weights if ".base_layer." in name or name.split(".")[-1] not in ("weight", "bias")]
    if changed:
        raise ValueError(
            f"The model to start from has adapters or quantized weights, such as {changed[0]}: merge its adapters first "
            "(`merge_and_unload` of the `PeftModel`), or load it without quantization."
        )
    weights = {name: value for name, value in weights.items() if not name.startswith("self_conditioning.")}
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(new)}
    if expected != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"`config_overrides` must leave all sizes as they are, got {config_overrides}.")
    model.load_state_dict(weights, strict=False)
    nn.init.zeros_(model.target_time_embedding.linear_2.weight)
    nn.init.zeros_(model.target_time_embedding.linear_2.bias)


def set_flow_map_defaults(generation_config: FLMGenerationConfig):
    """
    Sets how a new flow map generates: in one step, or in several with all of the noise drawn anew, which corrects errors of
    earlier steps (measured by `benchmarks/samplers.py`, see docs/sampling.md).
    """
    generation_config.num_steps = 1
    generation_config.gamma = 1.0


def check_is_flm(teacher: PreTrainedModel, argument: str = "teacher"):
    """Raises a `TypeError` if a flow map cannot start from a model. Compares class names, because remote code defines its own classes."""
    name = type(teacher).__name__
    if name != "FLMModel":
        hints = {
            "FMLMModel": " A flow map is a student already: pass it as `model`, or as `--student`.",
            "FMLMTwoNetworkModel": f" Pass its flow, `{argument}.flow`.",
        }
        merge = f" Merge its adapters first, `{argument}.merge_and_unload()`." if name.startswith("Peft") else ""
        raise TypeError(f"`{argument}` must be an `FLMModel`, got `{name}`.{hints.get(name, merge)}")


def flm_settings(config: FLMConfig) -> dict:
    """Returns the fields of a configuration that every [`FLMConfig`] has: sizes, tokens, times and caps."""
    not_settings = ("architectures", "dtype", "model_type", "transformers_version", "_name_or_path")
    names = FLMConfig().to_dict().keys() - set(not_settings)
    return {name: value for name, value in config.to_dict().items() if name in names}


def flow_map_config(config_class: type[FMLMConfig], teacher: FLMModel, overrides: dict) -> FMLMConfig:
    """Returns the configuration of a flow map with the sizes, tokens and attention implementation of its teacher."""
    if unknown := sorted(overrides.keys() - config_class().to_dict().keys()):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}.")
    config = config_class(**{**flm_settings(teacher.config), "self_conditioning": False, **overrides})
    config._attn_implementation = teacher.config._attn_implementation
    return config


__all__ = ["FLMModel", "FLMPreTrainedModel", "FMLMModel", "FMLMTwoNetworkModel"]
