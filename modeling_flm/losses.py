# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Losses between the head's outputs and a target, computed one chunk of positions at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .utils_flm import chunks


DIVERGENCES = ("cross_entropy", "kl", "squared_error")


def softcap_logits(logits: torch.Tensor, softcap: float | None, in_place: bool = False) -> torch.Tensor:
    r"""
    \\(c \tanh(z / c)\\).

    Args:
        logits (`torch.Tensor`): Outputs of a head, \\(z\\).
        softcap (`float`, *optional*): Bound \\(c\\) of the result. `None` for no bound.
        in_place (`bool`, *optional*, defaults to `False`): Whether to overwrite the outputs.

    Returns:
        `torch.Tensor` of the shape of `logits`.
    """
    if softcap is None:
        return logits
    if in_place:
        return logits.div_(softcap).tanh_().mul_(softcap)
    return softcap * torch.tanh(logits / softcap)


def _softcap_with_tanh(
    logits: torch.Tensor, softcap: float | None, workspace: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the capped logits, in `workspace` if there is one, and their hyperbolic tangents, which overwrite the logits."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return torch.mul(tanh, softcap, out=workspace), tanh


def _softcap_backward(gradients: torch.Tensor, tanh: torch.Tensor | None) -> torch.Tensor:
    """Turns gradients in the capped logits into gradients in the outputs of the head, in place."""
    if tanh is None:
        return gradients
    return torch.ops.aten.tanh_backward.grad_input(gradients, tanh, grad_input=gradients)


def _subtract_largest(logits: torch.Tensor) -> torch.Tensor:
    """
    Subtracts the largest logit of each token. In place, like all that follows: on a CPU, allocating memory for a chunk takes
    longer than the exponentials.
    """
    return logits.sub_(logits.amax(dim=-1, keepdim=True))


def softmax_divergence(
    divergence: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Divergence of \\(\delta = \mathrm{softmax}(\mathrm{logits})\\) from a target, per token. Overwrites logits in float32.

    Args:
        divergence (`str`):
            `"cross_entropy"`, \\(-\sum_v p_v \log \delta_v\\); `"kl"`, the cross-entropy minus the entropy of the target;
            `"squared_error"`, \\(\sum_v (p_v - \delta_v)^2\\); or `"inner_product"`, \\(\sum_v p_v \delta_v\\), for values
            \\(p\\) that are no distribution, such as the gradient of another loss in \\(\delta\\).
        logits (`torch.Tensor` of shape `(..., vocab_size)`): The logits.
        target (`torch.Tensor` of shape `(..., vocab_size)`): The target \\(p\\).
        softcap (`float`, *optional*): Bound of the logits, see [`softcap_logits`].
        workspace (`torch.Tensor` of the shape of `logits`, *optional*): Memory for the capped logits, in float32.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the divergences, of shape `(...)` and in float32, and their gradients in the
        logits, in the dtype of the logits.
    """
    if divergence not in (*DIVERGENCES, "inner_product"):
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    dtype = logits.dtype
    logits, tanh = _softcap_with_tanh(logits.float(), softcap, workspace)
    if divergence == "inner_product":
        exponentials = _subtract_largest(logits).exp_()
        delta = exponentials.div_(exponentials.sum(dim=-1, keepdim=True))
        losses = (delta * target).sum(dim=-1)
        gradients = delta.mul_(target - losses.unsqueeze(-1))
        return losses, _softcap_backward(gradients, tanh).to(dtype)
    if divergence == "squared_error":
        exponentials = _subtract_largest(logits).exp_()
        delta = exponentials.div_(exponentials.sum(dim=-1, keepdim=True))
        difference = delta - target
        losses = difference.square().sum(dim=-1)
        difference -= (delta * difference).sum(dim=-1, keepdim=True)
        gradients = delta.mul_(difference).mul_(2)
        return losses, _softcap_backward(gradients, tanh).to(dtype)
    mass = target.sum(dim=-1, keepdim=True)
    chosen = (target * _subtract_largest(logits)).sum(dim=-1, keepdim=True)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = (mass * sums.log() - chosen).squeeze(-1)
    if divergence == "kl":
        losses = losses + torch.xlogy(target, target).sum(dim=-1)
    gradients = exponentials.mul_(mass / sums).sub_(target)
    return losses, _softcap_backward(gradients, tanh).to(dtype)


def softmax_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropy to `labels` of shape `(...)`; otherwise like [`softmax_divergence`]. A label of -100 is read as token 0: give
    it no weight.
    """
    dtype = logits.dtype
    logits, tanh = _softcap_with_tanh(logits.float(), softcap, workspace)
    labels = labels.masked_fill(labels == -100, 0).unsqueeze(-1)
    chosen = _subtract_largest(logits).gather(-1, labels)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = sums.log() - chosen
    gradients = exponentials.div_(sums).scatter_add_(-1, labels, -torch.ones_like(losses))
    return losses.squeeze(-1), _softcap_backward(gradients, tanh).to(dtype)


# Takes outputs of the head, of shape `(batch_size, num_positions, vocab_size)`, which may be overwritten; their positions in
# the sequences; and on a CPU a workspace of their shape. Returns losses, and their gradients in the outputs.
LossFunction = Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


class _WeightedSum(torch.autograd.Function):
    """`sum(token_weights * losses)`. `backward` only scales precomputed gradients."""

    @staticmethod
    def forward(
        ctx, token_weights: torch.Tensor, losses: torch.Tensor, num_inputs: int, *inputs_and_gradients: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(losses)
        ctx.gradients = inputs_and_gradients[num_inputs:]
        return (token_weights * losses).sum()

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError("The loss has no second derivatives: pass no `create_graph=True`, or use the logits.")
        if ctx.gradients is None:
            raise RuntimeError(
                "Gradients are freed by the first `backward`: call `backward` once, even with `retain_graph=True`."
            )
        (losses,) = ctx.saved_tensors
        weights_gradient = scale * losses if ctx.needs_input_grad[0] else None
        # In place: the gradient of a large head would need as much memory again.
        gradients = [gradient.mul_(scale) for gradient in ctx.gradients]
        ctx.gradients = None
        return weights_gradient, None, None, *gradients, *(None for _ in gradients)


def _weighted_sum(
    token_weights: torch.Tensor,
    losses: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Returns `sum(token_weights * losses)`, differentiable in the inputs that have a gradient."""
    pairs = [(each, gradient) for each, gradient in zip(inputs, gradients) if gradient is not None]
    inputs, gradients = zip(*pairs) if pairs else ((), ())
    return _WeightedSum.apply(token_weights, losses, len(inputs), *inputs, *gradients)


def linear_loss(
    function: LossFunction,
    token_weights: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weighted sum of losses of the outputs of a linear head. Losses and gradients are computed together, one chunk of positions at
    a time: memory grows with a chunk and not with the tokens, and no matrix product is computed twice. Products are in bfloat16
    under bfloat16 autocast or with a bfloat16 head, losses in float32. Second derivatives are not supported.

    Args:
        function (`Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]`):
            Takes outputs of the head, of shape `(batch_size, num_positions, vocab_size)`, their positions in the sequences, and
            on a CPU a workspace of their shape; returns losses and gradients as [`softmax_divergence`] does.
        token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Weight of each token's loss. Differentiable.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Input of the head.
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`): Weight of the head.
        bias (`torch.Tensor` of shape `(vocab_size,)`): Bias of the head.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, a scalar, and the losses, of shape
        `(batch_size, sequence_length)`, without gradient.
    """
    token_weights, hidden_states = token_weights.to(weight.device), hidden_states.to(weight.device)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if (
        dtype != torch.bfloat16
    ):  # in float16 small gradients would vanish, because they are computed before they are scaled
        dtype = torch.float32
    inputs = (hidden_states, weight, bias)
    needs_hidden, needs_weight, needs_bias = (torch.is_grad_enabled() and each.requires_grad for each in inputs)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        low_weight, low_bias = weight.to(dtype), bias.to(dtype)
        on_cpu = device == "cpu"
        hidden_gradients, losses = [], []
        weight_gradient = torch.zeros_like(weight) if needs_weight else None
        bias_gradient = torch.zeros_like(bias) if needs_bias else None
        outputs_memory = workspace = None
        for chunk in chunks(*hidden_states.shape[:2], weight.shape[0], hidden_states.device):
            chunk_states = hidden_states[:, chunk].to(dtype).contiguous()  # for one matrix product
            flat = chunk_states.flatten(0, 1)
            if outputs_memory is None:  # the first chunk is the largest, and all use its memory
                outputs_memory = flat.new_empty(len(flat), len(weight))
                workspace = torch.empty_like(outputs_memory, dtype=torch.float32) if on_cpu else None
            outputs = outputs_memory[: len(flat)]
            if on_cpu and dtype == torch.float32:  # `addmm` would write the bias first and read it again
                torch.mm(flat, low_weight.T, out=outputs).add_(low_bias)
            else:
                torch.addmm(low_bias, flat, low_weight.T, out=outputs)
            shape = (*chunk_states.shape[:2], len(weight))
            chunk_workspace = None if workspace is None else workspace[: len(flat)].view(shape)
            chunk_losses, gradient = function(outputs.view(shape), chunk, chunk_workspace)
            losses.append(chunk_losses)
            # The token weights multiply the smaller tensors: hidden states and their gradients.
            gradient, weights = gradient.flatten(0, 1), token_weights[:, chunk, None]
            if needs_hidden:
                hidden_gradients.append((gradient @ low_weight).view(chunk_states.shape) * weights)
            if needs_weight:
                weighted = (weights * chunk_states).to(dtype).flatten(0, 1)
                if dtype == weight.dtype:
                    weight_gradient.addmm_(gradient.T, weighted)
                else:
                    weight_gradient += gradient.T @ weighted
            if needs_bias:
                bias_gradient += gradient.T @ weights.to(dtype).flatten()
        losses = torch.cat(losses, dim=1)
        hidden_gradient = torch.cat(hidden_gradients, dim=1).to(hidden_states.dtype) if needs_hidden else None
    return _weighted_sum(token_weights, losses, inputs, (hidden_gradient, weight_gradient, bias_gradient)), losses


def layer_loss(
    function: LossFunction,
    token_weights: torch.Tensor,
    hidden_states: torch.Tensor,
    layer: nn.Module,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As [`linear_loss`], for a head of any layer, such as one with adapters or with quantized or offloaded weights. Autograd
    computes the gradients of each chunk together with its losses: checkpointing would compute outputs and targets twice.

    Args:
        function (`Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]`):
            As for [`linear_loss`]; it gets no workspace.
        token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): Weight of each token's loss. Differentiable.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Input of the head.
        layer (`nn.Module`): The layer, whose trained parameters get gradients.
        head (`Callable[[torch.Tensor], torch.Tensor]`): Computes the outputs of a chunk of positions with it, in float32.
        vocab_size (`int`): Number of outputs per position.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, a scalar, and the losses, of shape
        `(batch_size, sequence_length)`, without gradient.
    """
    token_weights = token_weights.to(hidden_states.device)
    device = hidden_states.device.type
    in_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    needs_hidden = torch.is_grad_enabled() and hidden_states.requires_grad
    has_gradient = torch.is_grad_enabled() and (needs_hidden or len(trained) > 0)
    sums = [torch.zeros_like(parameter) for parameter in trained]
    hidden_gradients, losses = [], []
    for chunk in chunks(*hidden_states.shape[:2], vocab_size, hidden_states.device):
        chunk_states = hidden_states[:, chunk].detach().requires_grad_(needs_hidden)
        with torch.set_grad_enabled(has_gradient), torch.autocast(device, enabled=in_bfloat16):
            outputs = head(chunk_states)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            chunk_losses, gradient = function(outputs.detach().clone(), chunk, None)
            gradient *= token_weights[:, chunk, None]
        losses.append(chunk_losses)
        has_gradient = outputs.requires_grad
        if has_gradient:
            inputs = [chunk_states, *trained] if needs_hidden else trained
            gradients = torch.autograd.grad(outputs, inputs, gradient, allow_unused=True)
            # Some quantized weights have no gradients.
            has_gradient = any(part is not None for part in gradients)
            if needs_hidden:
                hidden_gradients.append(gradients[0])
            for total, part in zip(sums, gradients[needs_hidden:]):
                if part is not None:
                    total += part
    losses = torch.cat(losses, dim=1)
    if not has_gradient:
        return _weighted_sum(token_weights, losses, (), ()), losses
    hidden_gradient = torch.cat(hidden_gradients, dim=1) if needs_hidden else None
    return _weighted_sum(token_weights, losses, (hidden_states, *trained), (hidden_gradient, *sums)), losses
