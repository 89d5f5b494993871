"""Products of rows with weights, as autocast makes them, with gradients of weights in their own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ContextManager, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hubert_fast import backend, cpu
from hubert_fast.ops.arguments import autocast_dtype, without_autocast
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.weights import gradient_memory, in_dtype, is_lent, weight_gradient

_FIXED = 5  # arguments of the autograd function before the parameters


def linear(
    x: Tensor,  # [..., in]
    weights: Sequence[Tensor],  # each [out, in]
    biases: Sequence[Tensor] = (),  # each [out]; none, or one a weight
    *,
    learn_biases: bool = True,
) -> Tensor:  # [..., sum of out]
    """``x weight^T + bias`` for one weight, or for several side by side in one product.

    Under autocast, and for weights that have memory lent (`weights.lend`), a weight in 16 bits is not cast where its copy is
    at hand, and a product gives its gradient in its own dtype rather than in 16 bits; on a CPU several weights are not copied
    into one, and 16 bits are multiplied as `cpu.product_dtype` says. Of all that there is no second derivative. Elsewhere this is
    `F.linear`, and everywhere where the formula of `feed_forward` was asked for (backend "reference").

    Args:
        x: ``[..., in]`` float.
        weights: ``[out, in]`` float each.
        biases: ``[out]`` float each, one a weight, or none at all.
        learn_biases: whether biases get their gradient here; False where somebody else has it at hand.

    Returns:
        ``[..., out of the first, out of the second...]``, in autocast's dtype where it is on, else in that of ``x``.
    """
    dtype = autocast_dtype(x.device)
    # Autocast leaves float64 alone.
    dtype = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
    plain = x.ndim == 2 and is_plain_call((x, *weights, *biases)) and not backend.is_reference("feed_forward")
    if not (plain and _gains(x, weights, dtype)):
        biases = biases if learn_biases else [each.detach() for each in biases]
        if len(weights) == 1:
            return F.linear(x, weights[0], *biases)
        return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)
    multiplied_in = cpu.product_dtype(x.device, dtype)
    if torch.is_grad_enabled():
        return _Linear.apply(x, dtype, multiplied_in, learn_biases, len(weights), *weights, *biases)
    operands = _operands(weights, x.device, multiplied_in)
    return _product(x, operands, biases, dtype, multiplied_in)


def _gains(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether something is gained over `F.linear`: a cast of weights, of their gradients or of slow products, or a copy."""
    if x.dtype == torch.float64:  # autocast leaves it alone
        return False
    if autocast_dtype(x.device) is not None or all(map(is_lent, weights)):
        return True
    if any(each.dtype != x.dtype for each in weights):
        return False  # which is an error
    if not cpu.is_cpu(x.device):
        return False
    # Side by side several would have to be copied into one.
    if len(weights) > 1 or cpu.product_dtype(x.device, dtype) != dtype:
        return True
    out, depth = weights[0].shape
    # Autograd in Python takes what few rows gain.
    return cpu.onednn_wins(x, weights[0]) and (out > depth or not torch.is_grad_enabled())


def _operands(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """The weights in ``dtype``, in one tensor where they must be copied in any case, or as they are."""
    if cpu.is_cpu(device) and all(each.dtype == dtype and not is_lent(each) for each in weights):
        return [each.detach() for each in weights]
    return [in_dtype(weights, dtype)]


def _product(
    x: Tensor, operands: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype, multiplied_in: torch.dtype
) -> Tensor:
    x = x.to(multiplied_in)
    if len(operands) == 1:
        form = cpu.product if cpu.is_cpu(x.device) else F.linear
        with _without_autocast(x.device, dtype, multiplied_in):
            return form(x, operands[0], in_dtype(biases, multiplied_in) if biases else None).to(dtype)
    out = x.new_empty(len(x), sum(map(len, operands)))
    parts = out.split([len(each) for each in operands], 1)
    for i, (weight, part) in enumerate(zip(operands, parts)):
        if biases:
            torch.addmm(biases[i].to(x.dtype), x, weight.t(), out=part)
        else:
            torch.mm(x, weight.t(), out=part)
    return out.to(dtype)


def _without_autocast(device: torch.device, dtype: torch.dtype, multiplied_in: torch.dtype) -> ContextManager[Any]:
    """Autocast, where it is on, would have the product in ``dtype``."""
    return nullcontext() if dtype == multiplied_in else without_autocast(device)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        multiplied_in: torch.dtype,
        learn_biases: bool,
        count: int,
        *parameters: Tensor,
    ) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        x, operands = x.to(dtype), _operands(weights, x.device, multiplied_in)
        out = _product(x, operands, biases, dtype, multiplied_in)
        wants_weights = any(ctx.needs_input_grad[_FIXED : _FIXED + count])
        ctx.save_for_backward(x if wants_weights else None, *(operands if ctx.needs_input_grad[0] else ()))
        ctx.dtypes = weights[0].dtype, biases[0].dtype if biases else None, dtype, multiplied_in
        ctx.sizes = [len(each) for each in weights]
        ctx.wants_biases = learn_biases and any(ctx.needs_input_grad[_FIXED + count :])
        ctx.memory = [gradient_memory(weights), gradient_memory(biases) if ctx.wants_biases else None]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, *operands = ctx.saved_tensors
        with _without_autocast(gradient.device, *ctx.dtypes[2:]):
            found = _gradients(ctx, gradient, x, operands)
        return found[: len(ctx.needs_input_grad)]


def _gradients(
    ctx: Any, gradient: Tensor, x: Optional[Tensor], operands: Sequence[Tensor]
) -> tuple[Optional[Tensor], ...]:
    count, (weight_dtype, bias_dtype, _, multiplied_in) = len(ctx.sizes), ctx.dtypes
    weights = biases = (None,) * count
    upstream = gradient.to(multiplied_in)
    if x is not None:
        found = weight_gradient(upstream, x.to(multiplied_in), weight_dtype, ctx.memory[0])
        weights = found.split(ctx.sizes) if count > 1 else (found,)
    if ctx.wants_biases:
        found = torch.sum(gradient, 0, dtype=bias_dtype, out=ctx.memory[1])
        biases = found.split(ctx.sizes) if count > 1 else (found,)
    x_gradient = None
    if operands:
        parts = upstream.split([len(each) for each in operands], 1)
        x_gradient = parts[0] @ operands[0]
        for part, weight in zip(parts[1:], operands[1:]):
            x_gradient.addmm_(part, weight)
        x_gradient = x_gradient.to(gradient.dtype)
    return (x_gradient, *(None,) * (_FIXED - 1), *weights, *biases)
