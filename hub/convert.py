# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Converts a checkpoint of the paper's published code to a model folder: from a file, a folder or the Hub.

    flm-convert --checkpoint david3684/FMLM-B-LM1B --output fmlm_lm1b
    flm-convert --checkpoint lm1b_flm.ckpt --tokenizer bert-base-uncased --output flm_lm1b
    flm-convert --checkpoint flm.ckpt --correction stage1.ckpt --output fmlm_two_network

The type of the model is derived from the tensors, or from the algorithm that the checkpoint names where tensors are ambiguous.
No code in the file runs: see `hub/checkpoints.py`.
"""

import argparse
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_flm import FLMModel, FMLMModel, FMLMTwoNetworkModel
from modeling_flm.tokenization_flm import add_special_tokens
from modeling_flm.utils_flm import check_finite

from .checkpoints import Checkpoint, CheckpointError, HubCheckpoint, describe, open_checkpoint
from .records import is_hub_name


# The published name of the first distillation stage. Its checkpoint has the correction network only, with the tensors of a flow
# map.
_CORRECTION_ALGORITHM = "flm_distill"

# Names in the first published code, which does not cap logits. The later code uses `flm` as well.
_FIRST_ALGORITHMS = ("flm", _CORRECTION_ALGORITHM, "flm_distill_double", "flm_semigroup_distill")

# Other models that the published code trains with the same network.
_OTHER_MODELS = ("ar", "mdlm", "sedd", "d3pm", "udlm", "duo", "duo_base", "bd3lm", "candi")

# Cap of the logits in all later code
_SOFTCAP = 30.0

_MAX_LISTED = 20

logger = logging.get_logger(__name__)


def _refuse_other_models(checkpoint: Checkpoint):
    """Raises a [`CheckpointError`] for other models of the published code."""
    algorithm = checkpoint.algorithm
    names = checkpoint.tensors
    backbone = checkpoint.setting("algo", "backbone")
    reason = None
    if algorithm in _OTHER_MODELS or algorithm is not None and "mask" in algorithm:
        reason = f"it is a model of {algorithm!r}, which is neither an FLM nor a flow map"
    elif (type(backbone) is str and "mamba" in backbone) or any(".mixer." in name for name in names):
        reason = "its backbone is a Mamba (`algo.backbone`), not a transformer"
    elif any("cond_map" in name or "label_embed" in name for name in names):
        reason = "it is class-conditional (`cond_map`)"
    elif checkpoint.setting("model", "use_pos_emb") is True or any("pos_emb" in name for name in names):
        reason = "it has learned positions (`use_pos_emb`)"
    elif checkpoint.setting("algo", "causal_attention") is True:
        reason = "its attention is causal (`algo.causal_attention`)"
    elif checkpoint.setting("algo", "double_temb") is True and not _is_flow_map(names):
        # The published code does not save them under old names of the algorithm.
        reason = "it is a flow map (`algo.double_temb`) without the tensors of its second time embedding"
    if reason is not None:
        raise CheckpointError(f"{checkpoint.name} cannot be converted: {reason}.")


def _is_flow_map(names: Iterable[str]) -> bool:
    return any(name.startswith("target_time_embedding.") for name in names)


def _times(checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings of time, which tensors do not determine: FMLM+ has a time for every token, and no reparameterization."""
    is_named_so = checkpoint.algorithm == "fmlm_plus"
    is_plain = is_named_so or checkpoint.setting("algo", "skip_time_reparam") is True
    return {
        # A flow map without reparameterization is an FMLM+, whatever its name is.
        "per_token_timesteps": is_named_so or (is_plain and _is_flow_map(checkpoint.tensors)),
        "time_reparameterization": None if is_plain else "argmax",
    }


def _softcap(checkpoint: Checkpoint) -> float | None:
    """
    Cap of the logits, which no tensor and no setting determines. The published code introduced it together with the setting
    `sampling.gamma`, before the first models on the Hub.
    """
    if isinstance(checkpoint, HubCheckpoint):
        return _SOFTCAP
    if not checkpoint.has_settings:
        raise CheckpointError(
            f"{checkpoint.name} does not record whether its logits are capped: pass `--final_logit_softcapping 30`, as in the "
            "released weights, or `none`, as in the first published code."
        )
    is_first = checkpoint.setting("sampling", "gamma") is None and checkpoint.algorithm in _FIRST_ALGORITHMS
    return None if is_first else _SOFTCAP


def _gamma(checkpoint: Checkpoint) -> float | None:
    """Recorded share of fresh noise in sampling."""
    gamma = checkpoint.setting("sampling", "gamma")
    if gamma is None or (type(gamma) in (int, float) and 0 <= gamma <= 1):
        return gamma
    logger.warning(f"{checkpoint.name}: ignoring `sampling.gamma`, because it is not a number in [0, 1].")
    return None


def _sizes(checkpoint: Checkpoint, num_heads: int | None, length: int | None) -> dict[str, Any]:
    """Settings of our configuration, from the tensors and the configuration of a checkpoint."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    needed = ("embed_tokens.weight", "time_embedding.linear_1.weight", "layers.0.mlp.up_proj.weight")
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise CheckpointError(f"{checkpoint.name} is not a checkpoint of this architecture: no {', '.join(missing)}.")
    blocks = {match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    settings = {
        "vocab_size": shapes["embed_tokens.weight"][0],
        "hidden_size": shapes["embed_tokens.weight"][1],
        "intermediate_size": shapes["layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": len(blocks),
        "conditioning_size": shapes["time_embedding.linear_1.weight"][0],
        "timestep_embedding_size": shapes["time_embedding.linear_1.weight"][1],
        "num_attention_heads": checkpoint.setting("model", "n_heads") if num_heads is None else num_heads,
        "max_position_embeddings": checkpoint.setting("model", "length") if length is None else length,
    }
    for name, flag in (("num_attention_heads", "num_heads"), ("max_position_embeddings", "length")):
        if type(settings[name]) is not int or not 0 < settings[name] < 2**24:
            raise CheckpointError(
                f"{checkpoint.name} does not record a valid `{name}`: pass a positive number as `--{flag}`."
            )
    stated = {"hidden_size": "hidden_size", "num_hidden_layers": "n_blocks", "conditioning_size": "cond_dim"}
    for name, key in stated.items():
        value = checkpoint.setting("model", key)
        if type(value) is int and value != settings[name]:
            raise CheckpointError(
                f"{checkpoint.name} has `model.{key}: {value}`, but its tensors have {settings[name]}: some are missing."
            )
    dropout = checkpoint.setting("model", "dropout")
    if type(dropout) in (int, float) and 0 <= dropout < 1:
        settings["dropout"] = dropout
    return settings


def _build(
    model_class: type[PreTrainedModel],
    settings: dict[str, Any],
    networks: dict[str, tuple[Checkpoint, dict[str, Any]]],
) -> PreTrainedModel:
    """Builds a model from the weights of its networks, which are keyed by the prefix of their names."""

    def build(**changes) -> PreTrainedModel:
        try:
            with torch.device("meta"):
                return model_class(model_class.config_class(**{**settings, **changes}))
        except Exception as error:
            raise CheckpointError(f"No model has these sizes. {describe(error)}") from error

    # A model with a single block shows which tensors are needed. The full model is built only if all of them exist.
    prefixed = {prefix + name: tensor for prefix, (_, weights) in networks.items() for name, tensor in weights.items()}
    expected = {}
    for name, tensor in build(num_hidden_layers=1).state_dict().items():
        for block in range(settings["num_hidden_layers"] if "layers.0." in name else 1):
            expected[name.replace("layers.0.", f"layers.{block}.")] = tuple(tensor.shape)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in prefixed]
    problems += [
        f"unknown: {name!r} {tuple(tensor.shape)}" for name, tensor in prefixed.items() if name not in expected
    ]
    for name in expected.keys() & prefixed.keys():
        if prefixed[name].shape != expected[name]:
            problems.append(f"wrong shape: {name} {tuple(prefixed[name].shape)}, expected {expected[name]}")
    names = " and ".join(checkpoint.name for checkpoint, _ in networks.values())
    if problems:
        listed = sorted(problems)[:_MAX_LISTED]
        listed += [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
        raise CheckpointError("\n    ".join([f"The tensors of {names} do not match its sizes.", *listed]))

    tensors = {}
    for prefix, (checkpoint, weights) in networks.items():
        checkpoint.check_size(weights)
        for name, tensor in logging.tqdm(weights.items(), desc=f"Reading {checkpoint.name}", unit="tensor"):
            try:
                tensors[prefix + name] = checkpoint.load(tensor)
            except Exception as error:
                raise CheckpointError(f"{checkpoint.name}: {name} cannot be read: {describe(error)}") from error
    model = build()
    model.load_state_dict(tensors, assign=True)
    try:
        check_finite(names, model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return model.eval()


def convert(
    checkpoint: str | Path | Checkpoint,
    correction: str | Path | Checkpoint | None = None,
    raw_weights: bool = False,
    num_heads: int | None = None,
    length: int | None = None,
    final_logit_softcapping: float | str | None = "auto",
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """
    Builds the model of a published checkpoint.

    Args:
        checkpoint (`str`, `Path` or [`~checkpoints.Checkpoint`]):
            FLM, or flow map with one network: a PyTorch Lightning file, a folder with the `config.json` and
            `model.safetensors` of `PyTorchModelHubMixin`, or the name of a Hub repository.
        correction (`str`, `Path` or [`~checkpoints.Checkpoint`], *optional*):
            Correction network of the first distillation stage. `checkpoint` is its flow then.
        raw_weights (`bool`, *optional*, defaults to `False`):
            Whether to convert the raw weights instead of their moving average.
        num_heads (`int`, *optional*):
            Number of attention heads, if the checkpoint does not record it.
        length (`int`, *optional*):
            Length in tokens, if the checkpoint does not record it.
        final_logit_softcapping (`float`, *optional*, defaults to `"auto"`):
            Cap of the logits, `None` for none. By default 30, and none for files of the first published code.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub repository.
        token (`str`, *optional*):
            Token with read access to the Hub repository. Defaults to the token of `hf auth login`.

    Returns:
        [`FLMModel`], [`FMLMModel`], or with a `correction` [`FMLMTwoNetworkModel`], in float32 and evaluation mode. Its
        generation configuration has the `sampling.gamma` of the checkpoint.

    Raises:
        `CheckpointError`: if the checkpoint does not exist, has another type of model, or its tensors do not match.
    """
    main = open_checkpoint(checkpoint, revision, token)
    other = None if correction is None else open_checkpoint(correction, token=token)
    for opened in (main, other):
        if opened is not None:
            _refuse_other_models(opened)
    weights = main.weights(raw_weights)
    settings = _sizes(main, num_heads, length)
    softcap = final_logit_softcapping
    settings["final_logit_softcapping"] = _softcap(main) if softcap == "auto" else softcap
    settings |= _times(main)
    is_flow_map = _is_flow_map(weights)
    if other is None:
        if is_flow_map and main.algorithm == _CORRECTION_ALGORITHM:
            raise CheckpointError(
                f"{main.name} is the correction network of the first distillation stage: pass it as `--correction`, and the "
                "FLM that it corrects as `--checkpoint`."
            )
        if is_flow_map:
            settings["learned_loss_weighting"] = any(name.startswith("loss_weighting.") for name in weights)
        model = _build(FMLMModel if is_flow_map else FLMModel, settings, {"": (main, weights)})
    else:
        if is_flow_map:
            raise CheckpointError(f"{main.name} is a flow map: with `--correction`, `--checkpoint` must be an FLM.")
        corrections = other.weights(raw_weights)
        if not _is_flow_map(corrections):
            raise CheckpointError(f"{other.name} is not a flow map: `--correction` must be one of the first stage.")
        if other.algorithm not in (None, _CORRECTION_ALGORITHM):
            raise CheckpointError(
                f"{other.name} is of {other.algorithm!r}, a flow map by itself: pass it as `--checkpoint`."
            )
        other_settings = _sizes(other, num_heads, length)
        if different := [
            name for name in other_settings if settings[name] != other_settings[name] and name != "dropout"
        ]:
            raise CheckpointError(f"{main.name} and {other.name} do not match: they differ in {', '.join(different)}.")
        settings["learned_loss_weighting"] = any(name.startswith("loss_weighting.") for name in corrections)
        model = _build(FMLMTwoNetworkModel, settings, {"flow.": (main, weights), "correction.": (other, corrections)})
    model.generation_config.gamma = _gamma(main if other is None else other)
    return model


def _published_tokenizer(checkpoint: Checkpoint, vocab_size: int, token: str | None) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer that the checkpoint names, if that is possible."""
    name = checkpoint.setting("data", "tokenizer_name_or_path")
    if not is_hub_name(name):
        logger.warning(f"{checkpoint.name} does not name a tokenizer on the Hub: pass one as `--tokenizer`.")
        return None
    try:
        tokenizer = add_special_tokens(AutoTokenizer.from_pretrained(name, trust_remote_code=False, token=token))
    except Exception:  # network, or not the name of a tokenizer
        logger.warning(f"Could not load {name}, the tokenizer that the checkpoint names: pass one as `--tokenizer`.")
        return None
    if len(tokenizer) != vocab_size:
        logger.warning(
            f"The checkpoint names the tokenizer {name}, which has {len(tokenizer)} tokens, but the model has {vocab_size}: "
            "pass `--tokenizer`."
        )
        return None
    return tokenizer


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number below 10 million, got {text[:20]!r}")
    return int(text)


def _softcap_argument(text: str) -> float | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number or `none`, got {text!r}")
    return value


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="FLM, or flow map with one network: a .ckpt file, a folder with config.json and model.safetensors, or the name "
        "of a Hub repository",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--token", help="token for a private or gated repository (default: the one of `hf auth login`)"
    )
    parser.add_argument(
        "--correction", help="correction network of the first distillation stage; --checkpoint is its FLM"
    )
    parser.add_argument(
        "--tokenizer",
        help="name or folder of the tokenizer to save with the model (default: the one that the checkpoint names)",
    )
    parser.add_argument("--output", required=True, help="output folder, which must not exist")
    parser.add_argument(
        "--raw_weights",
        "--raw-weights",
        action="store_true",
        help="convert the raw weights instead of their moving average",
    )
    parser.add_argument(
        "--final_logit_softcapping",
        "--final-logit-softcapping",
        type=_softcap_argument,
        default="auto",
        help="cap of the logits, or `none` (default: 30, and none for files of the first published code)",
    )
    parser.add_argument(
        "--num_heads",
        "--num-heads",
        type=_positive,
        help="number of attention heads, if the checkpoint does not record it",
    )
    parser.add_argument("--length", type=_positive, help="length in tokens, if the checkpoint does not record it")
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if os.path.lexists(output):
        parser.error(f"--output: {output} already exists; name another folder")

    tokenizer = None
    if args.tokenizer is not None:
        try:
            tokenizer = add_special_tokens(AutoTokenizer.from_pretrained(args.tokenizer, token=args.token))
        except Exception as error:  # files, network or names
            parser.error(f"--tokenizer: {args.tokenizer} cannot be loaded. {describe(error)}")
    try:
        checkpoint = open_checkpoint(args.checkpoint, args.revision, args.token)
        embedding = checkpoint.tensors.get("embed_tokens.weight")
        if tokenizer is not None and embedding is not None and embedding.shape[:1] != (len(tokenizer),):
            parser.error(f"--tokenizer: it has {len(tokenizer)} tokens, but the model has {embedding.shape[0]}")
        model = convert(
            checkpoint,
            args.correction,
            raw_weights=args.raw_weights,
            num_heads=args.num_heads,
            length=args.length,
            final_logit_softcapping=args.final_logit_softcapping,
            token=args.token,
        )
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    if tokenizer is None:
        tokenizer = _published_tokenizer(checkpoint, model.config.vocab_size, args.token)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, name, getattr(tokenizer, name))
            setattr(model.generation_config, name, getattr(tokenizer, name))

    # The output folder appears once it is complete.
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch, output.name)  # others may read it, unlike a temporary folder
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        folder.rename(output)
    softcap = model.config.final_logit_softcapping
    cap = "without a cap" if softcap is None else f"capped at {softcap}"
    print(f"{type(model).__name__} with {model.num_parameters():,} parameters, logits {cap}: {output}")


if __name__ == "__main__":
    main()
