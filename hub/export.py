# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Exports one step of generation to ONNX, which runs without Python and torch: in a browser, in C++, on a phone.

    flm-export outputs/quickstart/fmlm                                  # to outputs/quickstart/fmlm/onnx
    flm-export me/my-model --output my-model --precisions float32 int8

A runtime draws standard normal noise and runs the step, once or at several increasing times, to get tokens.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from modeling_flm.base_flm import FLMPreTrainedModel
from modeling_flm.flow import flow_map, times_with_known
from modeling_flm.generation_config_flm import FLMGenerationConfig
from modeling_flm.joint_noise import JointNoise
from modeling_flm.sampling_flm import StochasticFlowMapSampler

from .loading import load_checked
from .page_tokenizers import tokenizer_warning
from .records import ONNX_FILES, ONNX_FOLDER


if TYPE_CHECKING:
    import onnx
    import onnxruntime


logger = transformers_logging.get_logger(__name__)

# Share of tokens that must be equal to PyTorch's. Rounding decides between equally likely tokens.
MIN_AGREEMENT = {"float32": 0.999, "float16": 0.98, "int8": 0.98}

_INPUTS = ("state", "timesteps", "target_timesteps", "input_ids", "prompt_mask", "gamma", "noise")
_OUTPUTS = ("next_state", "tokens")
_AXES = ("batch_size", "sequence_length")

# Number of 8-bit weights that share a scale
_BLOCK_SIZE = 32


class ExportError(Exception):
    """Raised if a model cannot be exported, with the reason."""


class FlowStep(nn.Module):
    r"""
    One step of the flow or the flow map, as a function of tensors.

    States are in the coordinates of the noise, so the noise is standard normal, and callers need neither the noise factor nor the
    embedding. With the factor \\(R\\) and the clean tokens \\(Q\\) of [`~joint_noise.JointNoise`], a state \\(z\\) represents
    \\(z R\\), and a token is a row of \\(Q\\). If the vocabulary is not larger than the embedding, these are the one-hot states
    of the paper.

    Args:
        model ([`FLMPreTrainedModel`]): The model.
    """

    def __init__(self, model: FLMPreTrainedModel):
        super().__init__()
        if model.takes_estimate:
            raise ValueError(
                "`model` has `self_conditioning`, which the exported step does not: export a flow map that is distilled from it."
            )
        self.model = model
        embeddings = [model.embed_vocabulary(embedding).detach().float() for embedding in model.embeddings]
        noise = JointNoise(*embeddings)
        self.register_buffer("factor", torch.cat([noise.factor(index) for index in range(len(embeddings))], dim=1))
        self.register_buffer("coordinates", noise.coordinates())

    @property
    def noise_size(self) -> int:
        """Number of Gaussian variables per token."""
        return self.factor.shape[0]

    def clean(self, tokens: torch.LongTensor) -> torch.Tensor:
        """Returns the states of known tokens."""
        if self.coordinates is None:
            return F.one_hot(tokens, self.model.config.vocab_size).to(self.factor.dtype)
        return F.embedding(tokens, self.coordinates)

    def forward(
        self,
        state: torch.Tensor,
        timesteps: torch.Tensor,
        target_timesteps: torch.Tensor,
        input_ids: torch.LongTensor,
        prompt_mask: torch.BoolTensor,
        gamma: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, noise_size)`):
                States, at time 0 standard normal noise. The states of known tokens are ignored.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): Reparameterized times of the states, in [0, 1).
            target_timesteps (`torch.Tensor` of shape `(batch_size,)`): Later times to move to; 1 is text.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Known tokens.
            prompt_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Mask of the known tokens.
            gamma (`torch.Tensor` of shape `(batch_size,)`):
                Share of the noise that is drawn anew, from 0 to 1, see [`~sampling_flm.StochasticFlowMapSampler`]. At target time 1
                it has no effect.
            noise (`torch.Tensor` of the shape of `state`): New standard normal noise; with a gamma of 0, any numbers.

        Returns:
            `tuple[torch.Tensor, torch.LongTensor]`: the states at the target times (the clean states of the tokens if all target
            times are 1), and the most likely tokens, of shape `(batch_size, sequence_length)`.
        """
        model, known = self.model, prompt_mask[..., None]
        state = torch.where(known, self.clean(input_ids), state)
        sampler = StochasticFlowMapSampler(gamma)
        later = sampler.target_tau(timesteps, target_timesteps, model.time_map)
        tau_s, tau_t = timesteps, torch.where(gamma > 0, later, target_timesteps)
        if model.config.per_token_timesteps:
            tau_s, tau_t = (times_with_known(tau, prompt_mask) for tau in (tau_s, tau_t))
        probabilities = model.predict(model.encode(state @ self.factor, tau_s, tau_t), tau_s, tau_t)
        tokens = torch.where(prompt_mask, input_ids, probabilities.argmax(dim=-1))
        s, t = (model.time_map.tau_to_t(tau) for tau in (timesteps, target_timesteps))

        def draft():
            mean = probabilities if self.coordinates is None else probabilities @ self.coordinates
            renoised = sampler.move(state, mean, s, t, noise)
            return torch.where(gamma[:, None, None] > 0, renoised, flow_map(state, mean, s, t))

        # The last step skips the product with all tokens, which takes as long as the head.
        next_state = torch.cond((target_timesteps < 1).any(), draft, lambda: self.clean(tokens))
        return torch.where(known, state, next_state), tokens


def export_onnx(
    model: FLMPreTrainedModel | str | Path,
    output: str | Path,
    precisions: Sequence[str] = ("float32",),
    check: bool = True,
) -> dict[str, float]:
    r"""
    Exports one step of a model, [`FlowStep`], to ONNX, for any batch size and length.

    Args:
        model ([`FLMPreTrainedModel`], `str` or `Path`):
            Model, or its name or folder.
        output (`str` or `Path`):
            Folder of the repository. Its subfolder `onnx/` gets `model.onnx`, `model_fp16.onnx` and `model_int8.onnx`.
        precisions (`Sequence[str]`, *optional*, defaults to `("float32",)`):
            Any of `"float32"`, `"float16"` and `"int8"`. `"int8"` means 8-bit weights except for time embeddings and the
            coordinates of tokens. Inputs and outputs are always in float32.
        check (`bool`, *optional*, defaults to `True`):
            Whether to run the files in ONNX Runtime, and to compare their tokens with PyTorch's; and to warn if the tokenizer reads
            texts differently in a browser, where Node.js and its package `@huggingface/tokenizers` can tell.

    Returns:
        `dict[str, float]`: for each precision the share of tokens that are equal to PyTorch's, the minimum over 1 and 4 steps
        (4 and 16 for an FLM). Empty without the check.

    Raises:
        `ExportError`: if a package is missing, or the check fails. Then nothing is written.
    """
    if not precisions or not ONNX_FILES.keys() >= set(precisions):
        raise ExportError(f"`precisions` must be some of {', '.join(ONNX_FILES)}, got {list(precisions)!r}.")
    _import_onnx()
    import onnxruntime

    repository = output if isinstance(model, PreTrainedModel) else model
    if not isinstance(model, PreTrainedModel):
        model = load(model)
    if not isinstance(model, FLMPreTrainedModel):
        raise ExportError(f"`model` is a `{type(model).__name__}`, not a flow-based language model.")
    output = Path(output, ONNX_FOLDER)
    output.parent.mkdir(parents=True, exist_ok=True)
    agreement = {}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{ONNX_FOLDER}-") as scratch:
        scratch = Path(scratch)
        model.save_pretrained(scratch / "model")
        full = FlowStep(_reload(model, scratch / "model", torch.float32))
        for precision in precisions:
            path = scratch / ONNX_FILES[precision]
            if precision == "int8":
                source = scratch / ONNX_FILES["float32"]
                if not source.is_file():
                    source = scratch / "unquantized.onnx"
                    _write(full, source)
                _quantize(source, path)
            else:
                dtype = getattr(torch, precision)
                _write(full if dtype == torch.float32 else FlowStep(_reload(model, scratch / "model", dtype)), path)
            if check:
                # One step of an FLM is little better than a guess, with many near ties.
                checked = (4, 16) if model.config.model_type == "flm" else (1, 4)
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                agreement[precision] = min(compare(session, full, num_steps) for num_steps in checked)
                if agreement[precision] < MIN_AGREEMENT[precision]:
                    raise ExportError(
                        f"{precision} reproduces only {agreement[precision]:.1%} of PyTorch's tokens: remove it from "
                        "`precisions`."
                    )
        output.mkdir(exist_ok=True)
        for precision in precisions:
            # Large weights are in a second file.
            for path in scratch.glob(f"{ONNX_FILES[precision]}*"):
                path.replace(output / path.name)
    if check:
        _check_tokenizer(repository)
    return agreement


def _check_tokenizer(repository: str | Path):
    """Warns if a tokenizer works differently in a browser."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(repository)
    except Exception:  # there is none
        return
    if tokenizer.is_fast and (warning := tokenizer_warning(tokenizer)):
        logger.warning(warning)


def _import_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"Exporting needs the package `{error.name}`: `pip install modeling-flm[onnx]`.") from error


def load(name: str | Path) -> FLMPreTrainedModel:
    """Loads a model from the Hub or a folder, in float32."""
    try:
        return load_checked(AutoModel, name, dtype=torch.float32)
    except OSError as error:
        raise ExportError(str(error)) from error


def _reload(model: FLMPreTrainedModel, folder: Path, dtype: torch.dtype) -> FLMPreTrainedModel:
    """Reloads a model on the CPU, with an attention that ONNX supports. Modules that need float32 keep it."""
    attention = "sdpa" if model.config.attn_logit_softcapping is None else "eager"
    model = type(model).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def _searchsorted(sorted_sequence, values, *, out_int32=False, right=False, side=None, sorter=None):
    """`torch.searchsorted(..., right=True)` for ONNX, which has none: counts the entries that are not larger."""
    from onnxscript import opset18 as op

    is_before = op.GreaterOrEqual(op.Unsqueeze(values, [-1]), sorted_sequence)
    return op.ReduceSum(op.Cast(is_before, to=7), [-1], keepdims=0)  # 7 is int64


def _write(step: FlowStep, path: Path):
    """Exports a step without checking the result."""
    batch_size, length = 2, 3  # of the example inputs: any numbers work
    example = (
        torch.zeros(batch_size, length, step.noise_size),
        torch.zeros(batch_size),
        torch.ones(batch_size),
        torch.zeros(batch_size, length, dtype=torch.long),
        torch.zeros(batch_size, length, dtype=torch.bool),
        torch.ones(batch_size),
        torch.zeros(batch_size, length, step.noise_size),
    )
    axes = [torch.export.Dim(name, min=1, max=2**16) for name in _AXES]
    shapes = tuple({axis: axes[axis] for axis in range(min(tensor.dim(), 2))} for tensor in example)
    with torch.no_grad():
        program = torch.export.export(step.eval(), example, dynamic_shapes=shapes)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=_INPUTS,
        output_names=_OUTPUTS,
        custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted},
        verbose=False,
    )
    for tensor in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        tensor.shape = type(tensor.shape)([*_AXES[: min(len(tensor.shape), 2)], *tensor.shape[2:]])
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
    exported.save(path)


def _quantize(source: Path, path: Path):
    """
    Quantizes float32 weights to 8 bits. Every block of weights and of activations has its own scale. With one scale for all
    activations, as in `quantize_dynamic`, 3 % of the tokens of a model with a vocabulary of 2,048 changed.
    """
    import onnx

    # The import below changes the logging of the whole process.
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    model = onnx.load(source)
    precise = [node.name for node in _nodes(model.graph) if not {"factor", "coordinates"}.isdisjoint(node.input)]
    config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK_SIZE, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=precise, algo_config=config)
    quantizer.process()
    is_large = Path(f"{source}.data").is_file()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=is_large)


def _nodes(graph: "onnx.GraphProto") -> "Iterator[onnx.NodeProto]":
    """Yields the nodes of a graph and of its branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)


def write_tokens(
    session: "onnxruntime.InferenceSession",
    noise: np.ndarray,
    num_steps: int = 1,
    input_ids: np.ndarray | None = None,
    prompt_mask: np.ndarray | None = None,
    gamma: float = 0.0,
    step_noise: np.ndarray | None = None,
) -> np.ndarray:
    """
    Generates with an exported step, in numpy.

    Args:
        session (`onnxruntime.InferenceSession`): Session of an exported file.
        noise (`np.ndarray` of shape `(batch_size, sequence_length, noise_size)`): Standard normal noise, float32.
        num_steps (`int`, *optional*, defaults to 1): Number of steps.
        input_ids (`np.ndarray` of shape `(batch_size, sequence_length)`, *optional*): Known tokens, int64.
        prompt_mask (`np.ndarray` of shape `(batch_size, sequence_length)`, *optional*): Mask of the known tokens, bool.
        gamma (`float`, *optional*, defaults to 0.0): Share of the noise that every step but the last draws anew, from 0 to 1.
        step_noise (`np.ndarray` of shape `(num_steps - 1, batch_size, sequence_length, noise_size)`, *optional*):
            This new noise, float32. Drawn from numpy's default generator if there is a gamma.

    Returns:
        `np.ndarray` of shape `(num_steps, batch_size, sequence_length)`: the tokens after each step, int64.

    Raises:
        `ValueError`: if `num_steps`, `gamma` or the shape of `step_noise` cannot be used.
    """
    config = FLMGenerationConfig(num_steps=num_steps, gamma=gamma)  # checks both
    gamma, shape = config.gamma or 0.0, noise.shape[:2]
    if step_noise is not None and step_noise.shape != (num_steps - 1, *noise.shape):
        raise ValueError(f"`step_noise` must have the shape {(num_steps - 1, *noise.shape)}, got {step_noise.shape}.")
    input_ids = np.zeros(shape, np.int64) if input_ids is None else input_ids
    prompt_mask = np.zeros(shape, bool) if prompt_mask is None else prompt_mask
    grid = np.linspace(0, 1, num_steps + 1, dtype=np.float32)
    if gamma and step_noise is None:
        step_noise = np.random.default_rng().standard_normal((num_steps - 1, *noise.shape), dtype=np.float32)
    gammas = np.full(shape[0], gamma, dtype=np.float32)
    state, drafts = noise, []
    for index, (tau_s, tau_t) in enumerate(zip(grid, grid[1:])):
        times = (np.full(shape[0], tau) for tau in (tau_s, tau_t))
        fresh = step_noise[index] if gamma and index < num_steps - 1 else noise
        state, tokens = session.run(None, dict(zip(_INPUTS, (state, *times, input_ids, prompt_mask, gammas, fresh))))
        drafts.append(tokens)
    return np.stack(drafts)


@torch.no_grad()
def compare(
    session: "onnxruntime.InferenceSession", step: FlowStep, num_steps: int = 1, num_samples: int = 16
) -> float:
    """
    Compares the tokens of an exported step with the tokens of PyTorch's `generate()` for the same noise, with default generation
    settings.

    Args:
        session (`onnxruntime.InferenceSession`): Session of an exported file.
        step ([`FlowStep`]): The same step in PyTorch, of a model in float32 on the CPU.
        num_steps (`int`, *optional*, defaults to 1): Number of steps.
        num_samples (`int`, *optional*, defaults to 16): Number of samples.

    Returns:
        `float`: the share of equal tokens.
    """
    model = copy.copy(step.model)
    model.generation_config = FLMGenerationConfig()
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, model.config.max_position_embeddings, step.noise_size)
    noise = torch.randn(shape, generator=generator)
    tokens = write_tokens(session, noise.numpy(), num_steps)[-1]
    expected = model.generate(num_samples=num_samples, num_steps=num_steps, prior_state=noise @ step.factor)
    return float((tokens == expected.numpy()).mean())


def main(arguments: list[str] | None = None, report: Callable[[str], None] = print):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=argparse.SUPPRESS,
        help="name of a model on the Hub, or its folder",
    )
    parser.add_argument("--model", help="the same, as for the other commands")
    parser.add_argument("--output", help="folder in which to create onnx/ (default: the model's)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=[*ONNX_FILES],
        default=[*ONNX_FILES],
        help=f"precisions to export (default: {' '.join(ONNX_FILES)})",
    )
    args = parser.parse_args(arguments)
    if args.model is None:
        parser.error("name the model")
    output = args.output or args.model
    if args.output is None and not Path(args.model).is_dir():
        parser.error(f"--output: pass an output folder, because {args.model} is not a folder")
    try:
        agreement = export_onnx(args.model, output, args.precisions)
    except ExportError as error:
        raise SystemExit(f"error: {error}") from None
    for precision, share in agreement.items():
        path = Path(output, ONNX_FOLDER, ONNX_FILES[precision])
        report(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {share:.2%} of its tokens are equal to PyTorch's")


if __name__ == "__main__":
    main()
