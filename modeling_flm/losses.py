# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""Losses between what a head says of every token and a target, of which only a chunk of tokens is held at a time."""

from collections.abc import Callable, Iterable

import torch

from .utils_flm import chunks


DIVERGENCES = ("cross_entropy", "kl", "squared_error")


def softcap_logits(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    r"""
    \\(c \tanh(z / c)\\), in place where there are no gradients.

    Args:
        logits (`torch.Tensor`): The outputs of a head, \\(z\\).
        softcap (`float`, *optional*): The bound \\(c\\) of what comes out. `None` for none.

    Returns:
        `torch.Tensor` of the shape of `logits`.
    """
    if softcap is None:
        return logits
    if torch.is_grad_enabled():
        return softcap * torch.tanh(logits / softcap)
    return logits.div_(softcap).tanh_().mul_(softcap)


def _softcap_with_tanh(
    logits: torch.Tensor, softcap: float | None, workspace: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The capped logits, in `workspace` if there is one, and their hyperbolic tangents, in place of the logits."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return torch.mul(tanh, softcap, out=workspace), tanh


def _chain(gradients: torch.Tensor, tanh: torch.Tensor | None) -> torch.Tensor:
    """Gradients in the outputs of the head, from those in the capped logits, in place."""
    if tanh is None:
        return gradients
    return torch.ops.aten.tanh_backward.grad_input(gradients, tanh, grad_input=gradients)


def _shift(logits: torch.Tensor) -> torch.Tensor:
    """
    Subtracts the largest logit of each token. In place, as all that follows: on a CPU getting new memory for a chunk takes
    longer than the exponentials.
    """
    return logits.sub_(logits.amax(dim=-1, keepdim=True))


def softmax_divergence(
    kind: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    softcap: float | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The divergence of \\(\delta = \mathrm{softmax}(\mathrm{logits})\\) from a target, per token. Logits in float32 are
    overwritten.

    Args:
        kind (`str`):
            `"cross_entropy"`, \\(-\sum_v p_v \log \delta_v\\); `"kl"`, which is less the entropy of the target; or
            `"squared_error"`, \\(\sum_v (p_v - \delta_v)^2\\).
        logits (`torch.Tensor` of shape `(..., vocab_size)`): The logits.
        target (`torch.Tensor` of shape `(..., vocab_size)`): The target \\(p\\).
        softcap (`float`, *optional*): Of the logits, see [`softcap_logits`].
        workspace (`torch.Tensor` of the shape of `logits`, *optional*):
            In float32, for the capped logits, so that they need no new memory.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the divergences, of shape `(...)` and in float32, and their gradients in the
        logits, in the dtype of the logits.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"`kind` must be one of {', '.join(DIVERGENCES)}, got {kind!r}.")
    dtype = logits.dtype
    logits, tanh = _softcap_with_tanh(logits.float(), softcap, workspace)
    if kind == "squared_error":
        exponentials = _shift(logits).exp_()
        delta = exponentials.div_(exponentials.sum(dim=-1, keepdim=True))
        difference = delta - target
        losses = difference.square().sum(dim=-1)
        difference -= (delta * difference).sum(dim=-1, keepdim=True)
        gradients = delta.mul_(difference).mul_(2)
        return losses, _chain(gradients, tanh).to(dtype)
    mass = target.sum(dim=-1, keepdim=True)
    chosen = (target * _shift(logits)).sum(dim=-1, keepdim=True)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = (mass * sums.log() - chosen).squeeze(-1)
    if kind == "kl":
        losses = losses + torch.xlogy(target, target).sum(dim=-1)
    gradients = exponentials.mul_(mass / sums).sub_(target)
    return losses, _chain(gradients, tanh).to(dtype)


def softmax_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As [`softmax_divergence`], the cross-entropy to `labels` of shape `(...)`. Those of -100 count as 0: give them no weight.
    """
    dtype = logits.dtype
    logits, tanh = _softcap_with_tanh(logits.float(), softcap, workspace)
    labels = labels.masked_fill(labels == -100, 0).unsqueeze(-1)
    chosen = _shift(logits).gather(-1, labels)
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses = sums.log() - chosen
    gradients = exponentials.div_(sums).scatter_add_(-1, labels, -torch.ones_like(losses))
    return losses.squeeze(-1), _chain(gradients, tanh).to(dtype)


# Outputs of the head, which may be overwritten; where they stand in the sequences; a workspace of their shape, on a CPU ->
# losses, and their gradients in the outputs
LossFunction = Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


class _HeadLoss(torch.autograd.Function):
    """
    `sum(token_weights * losses)` and `losses` of the outputs of a head. Gradients are made together with the losses of a
    chunk, so that nothing with `vocab_size` columns outlives it.
    """

    @staticmethod
    def forward(
        ctx,
        function: LossFunction,
        with_gradient: bool,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if dtype != torch.bfloat16:  # in float16 small gradients would vanish, as they are made before they are scaled
            dtype = torch.float32
        of_hidden, of_weight, of_bias = (with_gradient and ctx.needs_input_grad[index] for index in (3, 4, 5))
        low_weight, low_bias = weight.to(dtype), bias.to(dtype)
        on_cpu = device == "cpu"
        hidden_gradients, losses = [], []
        weight_gradient = torch.zeros_like(weight) if of_weight else None
        bias_gradient = torch.zeros_like(bias) if of_bias else None
        room = workspace = None  # of all chunks, the first of which is the largest
        with torch.autocast(device, enabled=False):
            for chunk in chunks(*hidden_states.shape[:2], weight.shape[0], hidden_states.device):
                inputs = hidden_states[:, chunk].to(dtype).contiguous()  # for one product of matrices
                flat = inputs.flatten(0, 1)
                if room is None:
                    room = flat.new_empty(len(flat), len(weight))
                    workspace = torch.empty_like(room, dtype=torch.float32) if on_cpu else None
                outputs = room[: len(flat)]
                if on_cpu and dtype == torch.float32:  # which would write the bias first and read it again
                    torch.mm(flat, low_weight.T, out=outputs).add_(low_bias)
                else:
                    torch.addmm(low_bias, flat, low_weight.T, out=outputs)
                shape = (*inputs.shape[:2], len(weight))
                chunk_workspace = None if workspace is None else workspace[: len(flat)].view(shape)
                chunk_losses, gradient = function(outputs.view(shape), chunk, chunk_workspace)
                losses.append(chunk_losses)
                # The weights multiply what is small, the inputs and their gradients.
                gradient, weights = gradient.flatten(0, 1), token_weights[:, chunk, None]
                if of_hidden:
                    hidden_gradients.append((gradient @ low_weight).view(inputs.shape) * weights)
                if of_weight:
                    weighted = (weights * inputs).to(dtype).flatten(0, 1)
                    if dtype == weight.dtype:
                        weight_gradient.addmm_(gradient.T, weighted)
                    else:
                        weight_gradient += gradient.T @ weighted
                if of_bias:
                    bias_gradient += gradient.T @ weights.to(dtype).flatten()
        losses = torch.cat(losses, dim=1)
        hidden_gradient = torch.cat(hidden_gradients, dim=1).to(hidden_states.dtype) if of_hidden else None
        ctx.save_for_backward(losses)
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        ctx.mark_non_differentiable(losses)
        return (token_weights * losses).sum(), losses

    @staticmethod
    def backward(ctx, scale: torch.Tensor, _):
        if torch.is_grad_enabled():
            raise RuntimeError("The loss has no second derivatives: pass no `create_graph=True`, or use the logits.")
        if ctx.gradients is None:
            raise RuntimeError(
                "The loss gives its gradients away: call `backward` once, even with `retain_graph=True`."
            )
        (losses,) = ctx.saved_tensors
        of_loss_weights = scale * losses if ctx.needs_input_grad[2] else None
        # In place: that of a large head would need as much memory again.
        gradients = [gradient if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients]
        ctx.gradients = None
        return None, None, of_loss_weights, *gradients


def head_loss(
    function: LossFunction,
    token_weights: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The weighted sum of losses of the outputs of a linear head, made a chunk of positions at a time, and their gradients
    along with them: memory grows with a chunk and not with the tokens, and no product is made twice. The products are in
    bfloat16 where autocast or the weight says so, the losses in float32. There are first derivatives only.

    Args:
        function (`Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]`):
            Takes the outputs of the head, of shape `(batch_size, num_positions, vocab_size)`, where they stand in the
            sequences, and on a CPU a workspace of their shape; returns what [`softmax_divergence`] does.
        token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): What each loss counts. Differentiable.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The input of the head.
        weight (`torch.Tensor` of shape `(vocab_size, hidden_size)`): The weight of the head.
        bias (`torch.Tensor` of shape `(vocab_size,)`): Its bias.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, a scalar, and the losses, of shape
        `(batch_size, sequence_length)`, without gradient.
    """
    token_weights, hidden_states = token_weights.to(weight.device), hidden_states.to(weight.device)
    return _HeadLoss.apply(function, torch.is_grad_enabled(), token_weights, hidden_states, weight, bias)


class _LayerLoss(_HeadLoss):
    """As [`_HeadLoss`], for a head that is called: its gradients are made by autograd, also a chunk at a time."""

    @staticmethod
    def forward(
        ctx,
        function: LossFunction,
        with_gradient: bool,
        token_weights: torch.Tensor,
        hidden_states: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden_states.device.type
        in_bfloat16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        _, _, _, of_hidden, _, _, *of_parameters = (with_gradient and needed for needed in ctx.needs_input_grad)
        trained = [parameter for parameter, needed in zip(parameters, of_parameters) if needed]
        hidden_gradients, losses, sums = [], [], [torch.zeros_like(parameter) for parameter in trained]
        has_gradient = of_hidden or len(trained) > 0
        for chunk in chunks(*hidden_states.shape[:2], vocab_size, hidden_states.device):
            inputs = hidden_states[:, chunk].detach().requires_grad_(of_hidden)
            with torch.set_grad_enabled(has_gradient), torch.autocast(device, enabled=in_bfloat16):
                outputs = head(inputs)
            with torch.autocast(device, enabled=False):
                chunk_losses, gradient = function(outputs.detach().clone(), chunk, None)
            losses.append(chunk_losses)
            has_gradient = outputs.requires_grad
            if has_gradient:
                gradient *= token_weights[:, chunk, None]
                inner = [inputs, *trained] if of_hidden else trained
                gradients = torch.autograd.grad(outputs, inner, gradient, allow_unused=True)
                # Some quantized weights give none.
                has_gradient = any(part is not None for part in gradients)
                if of_hidden:
                    hidden_gradients.append(gradients[0])
                for total, part in zip(sums, gradients[of_hidden:]):
                    if part is not None:
                        total += part
        losses = torch.cat(losses, dim=1)
        sums = iter(sums)
        ctx.save_for_backward(losses)
        ctx.gradients = (
            torch.cat(hidden_gradients, dim=1) if has_gradient and of_hidden else None,
            *(None, None),
            *(next(sums) if needed else None for needed in of_parameters),
        )
        total = (token_weights * losses).sum()
        is_differentiable = has_gradient or ctx.needs_input_grad[2]
        ctx.mark_non_differentiable(*([losses] if is_differentiable else [total, losses]))
        return total, losses


def layer_loss(
    function: LossFunction,
    token_weights: torch.Tensor,
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: Iterable[torch.Tensor],
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As [`head_loss`], for any head: one with adapters, or with quantized or offloaded weights.

    Args:
        function (`Callable[[torch.Tensor, slice, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]`):
            As for [`head_loss`]; it gets no workspace.
        token_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`): What each loss counts. Differentiable.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The input of the head.
        head (`Callable[[torch.Tensor], torch.Tensor]`): Makes outputs of a chunk of positions, in float32.
        parameters (`Iterable[torch.Tensor]`): The parameters of the head; those that are trained get gradients.
        vocab_size (`int`): The number of outputs of a position.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, a scalar, and the losses, of shape
        `(batch_size, sequence_length)`, without gradient.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    token_weights = token_weights.to(hidden_states.device)
    return _LayerLoss.apply(
        function, torch.is_grad_enabled(), token_weights, hidden_states, head, vocab_size, *trained
    )
