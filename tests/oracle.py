"""Reads the fixtures: values of the paper's published code on tiny random weights."""

import json
import pickle
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_flm import FLMConfig, FLMModel, FMLMConfig, FMLMModel, FMLMTwoNetworkConfig, FMLMTwoNetworkModel


FIXTURES = Path(__file__).parent / "fixtures"


class _Placeholder:
    """Stands in for the configuration objects in a published checkpoint, which the tests do not need."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = append


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module.split(".")[0] in ("torch", "collections"):
            return super().find_class(module, name)
        return _Placeholder


def load_checkpoint(name: str) -> dict:
    """A Lightning checkpoint as a dictionary, with everything but tensors and containers left out."""
    pickle_module = types.ModuleType("inert_pickle")
    pickle_module.Unpickler = _Unpickler
    pickle_module.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()
    return torch.load(FIXTURES / name, pickle_module=pickle_module, weights_only=False)


def values() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "values_tiny.safetensors")


def read_json(name: str) -> dict:
    return json.loads((FIXTURES / name).read_text())


def rename(name: str) -> str:
    """The name of a published parameter in our models."""
    for old, new in {
        "backbone.": "",
        "vocab_embed.embedding": "embed_tokens.weight",
        "sigma_map_prime": "target_sigma_map",
        "learnable_loss_weighting.s_embed.mlp.0": "loss_weighting.time_embedding.linear_1",
        "learnable_loss_weighting.s_embed.mlp.2": "loss_weighting.time_embedding.linear_2",
        "learnable_loss_weighting.mlp.0": "loss_weighting.linear_1",
        "learnable_loss_weighting.mlp.2": "loss_weighting.linear_2",
        "target_sigma_map.mlp.0": "target_time_embedding.linear_1",
        "target_sigma_map.mlp.2": "target_time_embedding.linear_2",
        "sigma_map.mlp.0": "time_embedding.linear_1",
        "sigma_map.mlp.2": "time_embedding.linear_2",
        "blocks.": "layers.",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_out": "self_attn.o_proj",
        "mlp.0": "mlp.up_proj",
        "mlp.2": "mlp.down_proj",
        "adaLN_modulation": "modulation",
        "output_layer.norm_final": "norm",
        "output_layer.linear": "lm_head",
        "output_layer.": "",
    }.items():
        name = name.replace(old, new)
    return name


def settings() -> dict:
    """The sizes of the published tiny models, as settings of our configurations."""
    sizes = read_json("values_tiny.json")
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_blocks"],
        "num_attention_heads": sizes["num_heads"],
        "conditioning_size": sizes["cond_dim"],
        "max_position_embeddings": sizes["length"],
        "attn_logit_softcapping": sizes["softcap"],
    }


def ema_weights(name: str) -> dict[str, torch.Tensor]:
    """The averaged weights of a published checkpoint, under the names of our models."""
    checkpoint = load_checkpoint(name)
    parameters = [name for name in checkpoint["state_dict"] if "rotary" not in name]  # a buffer has no average
    return dict(zip(map(rename, parameters), checkpoint["ema"]["shadow_params"], strict=True))


def flm() -> FLMModel:
    """The published tiny FLM."""
    model = FLMModel(FLMConfig(**settings())).eval()
    model.load_state_dict(ema_weights("flm_tiny.ckpt"))
    return model


def fmlm() -> FMLMModel:
    """The published tiny flow map of the second stage."""
    model = FMLMModel(FMLMConfig(**settings(), learned_loss_weighting=True)).eval()
    model.load_state_dict(ema_weights("fmlm_tiny.ckpt"))
    return model


def two_network_fmlm() -> FMLMTwoNetworkModel:
    """The published tiny FLM with the correction network of the first stage."""
    model = FMLMTwoNetworkModel(FMLMTwoNetworkConfig(**settings(), learned_loss_weighting=True)).eval()
    model.flow.load_state_dict(ema_weights("flm_tiny.ckpt"))
    model.correction.load_state_dict(ema_weights("fmlm_stage1_tiny.ckpt"))
    return model
