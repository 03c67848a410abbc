# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the filters below must precede the imports that warn)
"""Flow-based language models (FLM) for transformers."""

import logging


# transformers imports torchao, and peft imports bitsandbytes, where they are installed, and both warn on import about kernels
# that this library does not use. Drop only these messages; import those packages first to see them.
for _logger, _start in {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}.items():
    logging.getLogger(_logger).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .base_flm import FLMOutput
from .configuration_flm import FLMConfig, FMLMConfig, FMLMTwoNetworkConfig
from .generation_config_flm import FLMGenerationConfig, FLMGenerationOutput
from .generation_flm import FLMGenerationMixin
from .likelihood_flm import FLMLikelihoodOutput
from .modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from .pipeline_flm import FLMPipeline
from .rewards import ClassifierReward
from .sampling_flm import (
    BridgeSampler,
    BridgeSamplerConfig,
    FlowMapSampler,
    FlowMapSamplerConfig,
    Sampler,
    SamplerConfig,
    StochasticFlowMapSampler,
    StochasticFlowMapSamplerConfig,
)
from .time_reparameterization import IdentityTime, ReparameterizedTime


__version__ = "0.1.0.dev0"

for _config, _model in ((FLMConfig, FLMModel), (FMLMConfig, FMLMModel), (FMLMTwoNetworkConfig, FMLMTwoNetworkModel)):
    # With this package imported, the auto classes load its models from their configuration alone ...
    AutoConfig.register(_config.model_type, _config)
    for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        _auto_class.register(_config, _model)
    # ... and everything that is saved carries the code to be loaded without the package, with `trust_remote_code=True`.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")

__all__ = [
    "BridgeSampler",
    "BridgeSamplerConfig",
    "ClassifierReward",
    "FLMConfig",
    "FLMGenerationConfig",
    "FLMGenerationMixin",
    "FLMGenerationOutput",
    "FLMLikelihoodOutput",
    "FLMModel",
    "FLMOutput",
    "FLMPipeline",
    "FMLMConfig",
    "FMLMModel",
    "FMLMTwoNetworkConfig",
    "FMLMTwoNetworkModel",
    "FlowMapSampler",
    "FlowMapSamplerConfig",
    "IdentityTime",
    "ReparameterizedTime",
    "Sampler",
    "SamplerConfig",
    "StochasticFlowMapSampler",
    "StochasticFlowMapSamplerConfig",
]
