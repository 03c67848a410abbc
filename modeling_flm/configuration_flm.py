# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of flow-based language models."""

# ruff: noqa: E402
import copy
import dataclasses
import difflib

from transformers.utils.versions import require_version


# Remote code runs this file first: check versions before an import fails.
require_version("transformers>=5.20", "FLM models need a newer version: `pip install --upgrade transformers`.")

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# For `pipeline()` to find the file of the pipeline beside the model
CUSTOM_PIPELINES = {"text-generation": {"impl": "pipeline_flm.FLMPipeline", "pt": ["AutoModel"]}}


def strict_with_numpy(config_class: type) -> type:
    """As `@strict`, for numbers of numpy as well."""
    config_class = strict(config_class)
    set_checked = config_class.__setattr__

    def __setattr__(self, name, value):
        set_checked(self, name, value.item() if isinstance(value, np.generic) else value)

    config_class.__setattr__ = __setattr__
    return config_class


@strict_with_numpy
class FLMConfig(PreTrainedConfig):
    r"""
    Configuration of an [`FLMModel`], a flow-based language model. The defaults give the architecture of the paper's
    small models (12 blocks of width 768) with the vocabulary of `bert-base-uncased` and sequences of 128 tokens.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522):
            Vocabulary size V, at least 2.
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the token embedding and of the blocks.
        intermediate_size (`int`, *optional*):
            Width of the hidden layer of the MLPs. By default four times `hidden_size`.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of attention heads. The head size, `hidden_size / num_attention_heads`, must be even.
        conditioning_size (`int`, *optional*, defaults to 128):
            Width of the time embedding that modulates every block.
        timestep_embedding_size (`int`, *optional*, defaults to 256):
            Width of the sinusoidal time embedding. Must be even.
        max_position_embeddings (`int`, *optional*, defaults to 128):
            Sequence length in tokens.
        dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the output of every attention and MLP branch during training.
        attn_logit_softcapping (`float`, *optional*, defaults to 50.0):
            Bound of the attention logits (tanh softcap). The published weights need 50. `None` for no bound, which makes the fast
            `sdpa` attention available.
        final_logit_softcapping (`float`, *optional*, defaults to 30.0):
            Bound of the token logits (tanh softcap), as in Gemma 2. The released weights need 30, weights of the first published
            code need `None`, no bound. Does not apply to the correction network of an [`FMLMTwoNetworkModel`], whose outputs
            are not logits.
        layer_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the layer normalizations.
        per_token_timesteps (`bool`, *optional*, defaults to `False`):
            Whether the network is conditioned on the time of each token. Otherwise it receives one time per sequence (the
            smallest), and has to recognize known tokens by their states.
        time_reparameterization (`str`, *optional*, defaults to `"argmax"`):
            Reparameterized time \\(\tau\\), which is drawn uniformly and on which the network is conditioned: `"argmax"`, from the
            probability that the largest entry of a noised one-hot token is the right one, or `None`, \\(\tau = t\\), as in FMLM+.
        self_conditioning (`bool`, *optional*, defaults to `False`):
            Whether the network also reads an estimate of the text: in training its own, for half of the examples, which takes
            another forward pass for these, and in generation the estimate of the step before. A flow map has none: distilled with
            `teacher_iterations`, it learns from the result of several passes of its teacher.
        rope_parameters (`dict`, *optional*):
            Parameters of the rotary position embedding. By default `{"rope_type": "default", "rope_theta": 10000.0}`.
        bos_token_id (`int`, *optional*):
            Id of the token at the beginning of a sequence.
        eos_token_id (`int`, *optional*):
            Id of the token at the end of a sequence.
        pad_token_id (`int`, *optional*):
            Id of the padding token.

    Example:

    ```python
    >>> from modeling_flm import FLMConfig, FLMModel

    >>> config = FLMConfig(vocab_size=50258, max_position_embeddings=1024)
    >>> model = FLMModel(config)
    ```
    """

    model_type = "flm"
    keys_to_ignore_at_inference = ["last_hidden_state", "hidden_states", "attentions", "token_losses"]

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    conditioning_size: int = 128
    timestep_embedding_size: int = 256
    max_position_embeddings: int = 128
    dropout: float | int = 0.1
    attn_logit_softcapping: float | int | None = 50.0
    final_logit_softcapping: float | int | None = 30.0
    layer_norm_eps: float = 1e-5
    per_token_timesteps: bool = False
    time_reparameterization: str | None = "argmax"
    self_conditioning: bool = False
    rope_parameters: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if kwargs.pop("time_reparameterization_end", None) is not None:
            raise ValueError(
                "`time_reparameterization_end` is not supported: models with this longer time schedule need the version that "
                "they were trained with."
            )
        names = [field.name for field in dataclasses.fields(self)]
        for name in kwargs:
            if close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
                logger.warning(f"`{type(self).__name__}` has no `{name}`: did you mean `{close[0]}`?")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers only warns, and a model with the weights of another type generates nonsense.
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            hint = " `FMLMModel.from_flm(FLMModel.from_pretrained(...))` starts a flow map from an FLM."
            raise ValueError(
                f"The configuration has `model_type` '{model_type}', not '{cls.model_type}': load the model with its own class, or "
                f"with `AutoModel` and `AutoConfig`.{hint if model_type == 'flm' else ''}"
            )
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Part of the validation by `@strict`. Raises a `ValueError` for sizes that cannot be built."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "conditioning_size")
        for name in (*names, "timestep_embedding_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}.")
        if self.vocab_size < 2:
            raise ValueError(f"`vocab_size` must be at least 2, got {self.vocab_size}.")
        if self.hidden_size % (2 * self.num_attention_heads) != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}): rotary embeddings need an even head size."
            )
        if self.timestep_embedding_size % 2 != 0:
            raise ValueError(f"`timestep_embedding_size` must be even, got {self.timestep_embedding_size}.")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            softcap = getattr(self, name)
            if softcap is not None and not softcap > 0:
                raise ValueError(f"`{name}` must be positive, or `None` for no bound, got {softcap}.")
        if self.time_reparameterization not in (None, "argmax"):
            raise ValueError(
                f"`time_reparameterization` must be 'argmax', or `None` for none, got {self.time_reparameterization!r}."
            )
        allowed = {
            "rope_type": "default",
            "rope_theta": self.rope_parameters["rope_theta"],
            "partial_rotary_factor": 1.0,
        }
        for name, value in self.rope_parameters.items():
            if value != allowed.get(name):
                raise ValueError(f"`rope_parameters` has {name!r}: {value!r}, but only `rope_theta` can be set.")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be `False`: the head is not the transposed embedding.")


@strict_with_numpy
class FMLMConfig(FLMConfig):
    r"""
    Configuration of an [`FMLMModel`], a flow map language model. It has one more field than [`FLMConfig`].

    Args:
        learned_loss_weighting (`bool`, *optional*, defaults to `False`):
            Whether the model has a small network \\(w(s)\\) that balances the losses of different times in training,
            `exp(-w) * loss + w`. Generation does not use it.
    """

    model_type = "fmlm"

    learned_loss_weighting: bool = False

    def validate_architecture(self):
        super().validate_architecture()
        if self.self_conditioning:
            raise ValueError("`self_conditioning` is for an `FLMConfig`: a flow map reads its state alone.")


@strict_with_numpy
class FMLMTwoNetworkConfig(FMLMConfig):
    r"""
    Configuration of an [`FMLMTwoNetworkModel`]. Both networks have the sizes of this [`FMLMConfig`].
    """

    model_type = "fmlm_two_network"


# Identify our models by `model_type`: classes loaded as remote code are different objects.
FLOW_MODEL_TYPES = tuple(config.model_type for config in (FLMConfig, FMLMConfig, FMLMTwoNetworkConfig))

__all__ = ["FLMConfig", "FMLMConfig", "FMLMTwoNetworkConfig"]
