# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Writes a step of generation as ONNX, which runs without Python and torch: in a browser, in C++, on a phone.

    flm-export outputs/quickstart/fmlm                                  # to outputs/quickstart/fmlm/onnx
    flm-export me/my-model --output my-model --precisions float32 int8

A runtime draws standard normal noise, runs the step once, or as often as it likes at later and later times, and has the tokens.
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
from transformers import AutoModel, PreTrainedModel

from modeling_flm.flow import flow_map, times_with_known
from modeling_flm.generation_config_flm import FLMGenerationConfig
from modeling_flm.joint_noise import JointNoise
from modeling_flm.modeling_flm import FLMPreTrainedModel
from modeling_flm.time_reparameterization import TimeMap

from .records import ONNX_FILES, ONNX_FOLDER


if TYPE_CHECKING:
    import onnx
    import onnxruntime


# What share of the tokens of one step must be PyTorch's: two tokens may be equally likely up to rounding.
MIN_AGREEMENT = {"float32": 0.999, "float16": 0.98, "int8": 0.98}

_INPUTS = ("state", "timesteps", "target_timesteps", "input_ids", "prompt_mask")
_OUTPUTS = ("next_state", "tokens")
_AXES = ("batch_size", "sequence_length")

# So many weights of 8 bits in a row have a scale in common.
_BLOCK_SIZE = 32


class ExportError(Exception):
    """A model that could not be exported; the message says why."""


class FlowStep(nn.Module):
    r"""
    A step of the flow, or of the flow map, as a function of tensors alone.

    States are in the coordinates of the noise: noise is standard normal, and a step needs neither a factor of the noise nor the
    embedding from outside. With the factor \\(R\\) and the clean tokens \\(Q\\) of [`~joint_noise.JointNoise`], a state
    \\(z\\) stands for \\(z R\\), a token for a row of \\(Q\\). Where the vocabulary is not larger than the embedding, these are
    the one-hot states of the paper.

    Args:
        model ([`FLMPreTrainedModel`]): The model.
    """

    def __init__(self, model: FLMPreTrainedModel):
        super().__init__()
        self.model = model
        embeddings = [model.embed_vocabulary(embedding).detach().float() for embedding in model.embeddings]
        noise = JointNoise(*embeddings)
        self.register_buffer("factor", torch.cat([noise.factor(index) for index in range(len(embeddings))], dim=1))
        self.register_buffer("coordinates", noise.coordinates())

    @property
    def noise_size(self) -> int:
        """The number of Gaussian variables per token."""
        return self.factor.shape[0]

    def clean(self, tokens: torch.LongTensor) -> torch.Tensor:
        """The states of tokens that are known."""
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
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Args:
            state (`torch.Tensor` of shape `(batch_size, sequence_length, noise_size)`):
                The states; at the time 0 standard normal noise. What they are where tokens are known does not matter.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): The reparameterized times of the states, in [0, 1).
            target_timesteps (`torch.Tensor` of shape `(batch_size,)`): Those to go to, later ones; 1 is text.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The tokens that are known.
            prompt_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where they are.

        Returns:
            `tuple[torch.Tensor, torch.LongTensor]`: the states at the target times, which are those of the tokens where all are 1,
            and the likeliest tokens, of shape `(batch_size, sequence_length)`.
        """
        model, known = self.model, prompt_mask[..., None]
        state = torch.where(known, self.clean(input_ids), state)
        tau_s, tau_t = timesteps, target_timesteps
        if model.config.per_token_timesteps:
            tau_s, tau_t = (times_with_known(tau, prompt_mask) for tau in (tau_s, tau_t))
        probabilities = model.predict(model.encode(state @ self.factor, tau_s, tau_t), tau_s, tau_t)
        tokens = torch.where(prompt_mask, input_ids, probabilities.argmax(dim=-1))
        s, t = (model.time_map.tau_to_t(tau) for tau in (timesteps, target_timesteps))

        def draft():
            mean = probabilities if self.coordinates is None else probabilities @ self.coordinates
            return flow_map(state, mean, s, t)

        # The last step does without the product with all tokens, which takes as long as the head.
        next_state = torch.cond((target_timesteps < 1).any(), draft, lambda: self.clean(tokens))
        return torch.where(known, state, next_state), tokens


def export_onnx(
    model: FLMPreTrainedModel | str | Path,
    output: str | Path,
    precisions: Sequence[str] = ("float32",),
    check: bool = True,
) -> dict[str, float]:
    r"""
    Writes a step of a model, [`FlowStep`], as ONNX, for any number of texts and any length.

    Args:
        model ([`FLMPreTrainedModel`], `str` or `Path`):
            The model, or its name or folder.
        output (`str` or `Path`):
            The folder of the repository. The files are written to `onnx/` in it: `model.onnx`, `model_fp16.onnx` and
            `model_int8.onnx`.
        precisions (`Sequence[str]`, *optional*, defaults to `("float32",)`):
            Which of `"float32"`, `"float16"` and `"int8"` to write. The last has weights of 8 bits, but for the embeddings of
            times and the coordinates of tokens. Inputs and outputs are in float32 in any case.
        check (`bool`, *optional*, defaults to `True`):
            Whether to run what was written, in ONNX Runtime, and to compare its tokens with PyTorch's.

    Returns:
        `dict[str, float]`: for each precision the share of tokens that are PyTorch's, in one step or in four, whichever is
        smaller; of an FLM in 4 or 16; without a check an empty one.

    Raises:
        `ExportError`: if a package is missing, or the check fails. Then nothing is written.
    """
    if not precisions or not ONNX_FILES.keys() >= set(precisions):
        raise ExportError(f"`precisions` must be some of {', '.join(ONNX_FILES)}, got {list(precisions)!r}.")
    _import_onnx()
    import onnxruntime

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
                # One step of an FLM is hardly more than a guess, with many ties.
                checked = (4, 16) if model.config.model_type == "flm" else (1, 4)
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                agreement[precision] = min(compare(session, full, num_steps) for num_steps in checked)
                if agreement[precision] < MIN_AGREEMENT[precision]:
                    raise ExportError(
                        f"Only {agreement[precision]:.1%} of the tokens of {precision} are those of PyTorch: leave it out of "
                        "`precisions`."
                    )
        output.mkdir(exist_ok=True)
        for precision in precisions:
            # Large weights lie in a file of their own beside it.
            for path in scratch.glob(f"{ONNX_FILES[precision]}*"):
                path.replace(output / path.name)
    return agreement


def _import_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"Exporting needs the package `{error.name}`: `pip install modeling-flm[onnx]`.") from error


def load(name: str | Path) -> FLMPreTrainedModel:
    """The model of this name or in this folder, in float32."""
    try:
        return AutoModel.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # of files, of formats, of sizes
        raise ExportError(f"{name} cannot be loaded: {error}") from error


def _reload(model: FLMPreTrainedModel, folder: Path, dtype: torch.dtype) -> FLMPreTrainedModel:
    """The model on the CPU, with the attention that ONNX has, and in a precision in which what needs float32 keeps it."""
    attention = "sdpa" if model.config.attn_logit_softcapping is None else "eager"
    model = type(model).from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def _searchsorted(sorted_sequence, values, *, out_int32=False, right=False, side=None, sorter=None):
    """`torch.searchsorted(..., right=True)` in ONNX, which has none: how many are not larger. The tables are small."""
    from onnxscript import opset18 as op

    is_before = op.GreaterOrEqual(op.Unsqueeze(values, [-1]), sorted_sequence)
    return op.ReduceSum(op.Cast(is_before, to=7), [-1], keepdims=0)  # 7 is int64


def _write(step: FlowStep, path: Path):
    """Exports a step, without a check."""
    batch_size, length = 2, 3  # of the example: all numbers will do
    example = (
        torch.zeros(batch_size, length, step.noise_size),
        torch.zeros(batch_size),
        torch.ones(batch_size),
        torch.zeros(batch_size, length, dtype=torch.long),
        torch.zeros(batch_size, length, dtype=torch.bool),
    )
    _build_table(step.model.time_map)
    axes = [torch.export.Dim(name, min=1, max=2**16) for name in _AXES]
    shapes = tuple({axis: axes[axis] for axis in range(min(tensor.dim(), 2))} for tensor in example)
    # With gradients nothing is split into chunks, whose number would depend on the sizes.
    with torch.enable_grad():
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
        node.metadata_props.clear()  # where code lies on this machine
        for value in node.outputs:
            value.metadata_props.clear()
    exported.save(path)


def _build_table(time_map: TimeMap):
    """Makes the table of times now, as one that is made during an export would have no values."""
    time_map.tau_to_t(torch.zeros(1))


def _quantize(source: Path, path: Path):
    """
    Makes weights of 8 bits of those of float32. Each block of weights and of activations has a scale of its own: with one for
    all activations, as `quantize_dynamic` has it, a model of definitions with 2,048 tokens wrote 3 % of them otherwise.
    """
    import onnx

    # Importing it sets up the logging of the whole process.
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
    """The nodes of a graph, with those of its branches."""
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
) -> np.ndarray:
    """
    Generates texts with an exported step, in numpy alone.

    Args:
        session (`onnxruntime.InferenceSession`): A session of one of the files.
        noise (`np.ndarray` of shape `(batch_size, sequence_length, noise_size)`): Standard normal variables, float32.
        num_steps (`int`, *optional*, defaults to 1): The number of steps.
        input_ids (`np.ndarray` of shape `(batch_size, sequence_length)`, *optional*): Known tokens, int64.
        prompt_mask (`np.ndarray` of shape `(batch_size, sequence_length)`, *optional*): Where they are, bool.

    Returns:
        `np.ndarray` of shape `(num_steps, batch_size, sequence_length)`: the tokens after each step, int64.
    """
    shape = noise.shape[:2]
    input_ids = np.zeros(shape, np.int64) if input_ids is None else input_ids
    prompt_mask = np.zeros(shape, bool) if prompt_mask is None else prompt_mask
    grid = np.linspace(0, 1, num_steps + 1, dtype=np.float32)
    state, drafts = noise, []
    for tau_s, tau_t in zip(grid, grid[1:]):
        times = (np.full(shape[0], tau) for tau in (tau_s, tau_t))
        state, tokens = session.run(None, dict(zip(_INPUTS, (state, *times, input_ids, prompt_mask))))
        drafts.append(tokens)
    return np.stack(drafts)


@torch.no_grad()
def compare(
    session: "onnxruntime.InferenceSession", step: FlowStep, num_steps: int = 1, num_samples: int = 16
) -> float:
    """
    How much of what an exported step writes is what PyTorch's `generate()` writes from the same noise, without whatever else
    the model's `generation_config.json` asks for, such as a temperature.

    Args:
        session (`onnxruntime.InferenceSession`): A session of one of the files.
        step ([`FlowStep`]): The step, of a model in float32 and on the CPU.
        num_steps (`int`, *optional*, defaults to 1): In how many steps to write.
        num_samples (`int`, *optional*, defaults to 16): How many texts to write.

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
        help="the name of a model of the Hub, or its folder",
    )
    parser.add_argument("--model", help="the same, as for the other commands")
    parser.add_argument("--output", help="the folder in which to make onnx/ (default: the model's)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=[*ONNX_FILES],
        default=[*ONNX_FILES],
        help=f"which to write (default: {' '.join(ONNX_FILES)})",
    )
    args = parser.parse_args(arguments)
    if args.model is None:
        parser.error("name the model")
    output = args.output or args.model
    if args.output is None and not Path(args.model).is_dir():
        parser.error(f"--output: {args.model} is no folder: name one to write to")
    try:
        agreement = export_onnx(args.model, output, args.precisions)
    except ExportError as error:
        raise SystemExit(f"error: {error}") from None
    for precision, share in agreement.items():
        path = Path(output, ONNX_FOLDER, ONNX_FILES[precision])
        report(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {share:.2%} of its tokens are PyTorch's")


if __name__ == "__main__":
    main()
