"""Products of rows with weights, as autocast makes them, with gradients of weights in their own dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hubert_fast import backend, cpu
from hubert_fast.ops.arguments import autocast_dtype, without_autocast
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.weights import gradient_memory, has_copy, in_dtype, is_lent, weight_gradient

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
    at hand, and a product gives its gradient in its own dtype rather than in 16 bits. On a CPU several weights are not copied
    into one, one without such memory is left to autocast, and 16 bits are multiplied as `cpu.product_dtype` says. Where
    something is cast here there is no second derivative. Elsewhere this is `F.linear`, and everywhere
    where the formula of `feed_forward` was asked for (backend "reference").

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
    if not (
        x.ndim == 2
        and not torch.compiler.is_compiling()
        and not _is_left_to_autocast(x, weights, dtype)
        and is_plain_call((x, *weights, *biases))
        and not cpu.in_forward_mode()
        and not backend.is_reference("feed_forward")
        and _gains(x, weights, biases, dtype)
    ):
        biases = biases if learn_biases else [each.detach() for each in biases]
        if len(weights) == 1:
            return F.linear(x, weights[0], *biases)
        return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)
    multiplied_in = cpu.product_dtype(x.device, dtype)
    if torch.is_grad_enabled():
        cast = not dtype == multiplied_in == weights[0].dtype or any(map(is_lent, weights))
        form = _CastLinear if cast else _Linear
        return form.apply(x, dtype, multiplied_in, learn_biases, len(weights), *weights, *biases)
    return _product(x, _operands(weights, x.device, multiplied_in), biases, dtype, multiplied_in, learning=False)


def _is_left_to_autocast(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether autocast's own cast costs less host time and loses nothing: a CPU gives no product of 16 bits in float32."""
    if len(weights) > 1 or not cpu.is_cpu(x.device) or autocast_dtype(x.device) is None:
        return False
    return cpu.product_dtype(x.device, dtype) == dtype and not is_lent(weights[0])


def _gains(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether something is gained over `F.linear`: a cast of weights, of their gradients or of slow products, or a copy."""
    if x.dtype == torch.float64:  # autocast leaves it alone
        return False
    if any(bias.shape != weight.shape[:1] for weight, bias in zip(weights, biases)):
        return False  # PyTorch broadcasts it
    if autocast_dtype(x.device) is not None or all(map(is_lent, weights)):
        return True
    if any(each.dtype != x.dtype for each in (*weights, *biases)) or not cpu.is_cpu(x.device):
        return False  # the former is an error
    # Side by side several would have to be copied into one.
    if len(weights) > 1 or cpu.product_dtype(x.device, dtype) != dtype:
        return True
    return cpu.onednn_wins(x, weights[0], learning=torch.is_grad_enabled())


def _operands(weights: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Sequence[Tensor]:
    """The weights as they are where a CPU multiplies them so; otherwise in ``dtype``, in one tensor."""
    if cpu.is_cpu(device) and all(each.dtype == dtype and not has_copy(each, dtype) for each in weights):
        return weights
    return [in_dtype(weights, dtype)]


def _product(
    x: Tensor,
    operands: Sequence[Tensor],
    biases: Sequence[Tensor],
    dtype: torch.dtype,
    multiplied_in: torch.dtype,
    *,
    learning: bool,
) -> Tensor:
    x = x.to(multiplied_in)
    if len(operands) == 1:
        form = functools.partial(cpu.product, learning=learning) if cpu.is_cpu(x.device) else F.linear
        with without_autocast(x.device):  # which might have the product in ``dtype``
            return form(x, operands[0], in_dtype(biases, multiplied_in) if biases else None).to(dtype)
    out = x.new_empty(len(x), sum(map(len, operands)))
    parts = out.split([len(each) for each in operands], 1)
    for i, (weight, part) in enumerate(zip(operands, parts)):
        cpu.product_into(part, x, weight, biases[i].to(x.dtype) if biases else None, learning=learning)
    return out.to(dtype)


class _Linear(torch.autograd.Function):
    """Nothing is cast, so the backward may be differentiated."""

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
        out = _product(x, operands, biases, dtype, multiplied_in, learning=True)
        wants_weights = any(ctx.needs_input_grad[_FIXED : _FIXED + count])
        kept = weights if multiplied_in != dtype else operands  # widened again in the backward
        ctx.save_for_backward(x if wants_weights else None, *(kept if ctx.needs_input_grad[0] else ()))
        ctx.dtypes = weights[0].dtype, biases[0].dtype if biases else None, multiplied_in
        ctx.sizes = [len(each) for each in weights]
        ctx.wants_biases = learn_biases and any(ctx.needs_input_grad[_FIXED + count :])
        ctx.memory = [gradient_memory(weights), gradient_memory(biases) if ctx.wants_biases else None]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, *operands = ctx.saved_tensors
        with without_autocast(gradient.device):
            return _gradients(ctx, gradient, x, operands)[: len(ctx.needs_input_grad)]


class _CastLinear(_Linear):
    backward = staticmethod(once_differentiable(_Linear.backward))


def _gradients(
    ctx: Any, gradient: Tensor, x: Optional[Tensor], operands: Sequence[Tensor]
) -> tuple[Optional[Tensor], ...]:
    count, (weight_dtype, bias_dtype, multiplied_in) = len(ctx.sizes), ctx.dtypes
    weights = biases = (None,) * count
    upstream = gradient.to(multiplied_in)
    if x is not None:
        found = weight_gradient(upstream, x.to(multiplied_in), weight_dtype, ctx.memory[0])
        weights = found.split(ctx.sizes) if count > 1 else (found,)
    if ctx.wants_biases:
        found = cpu.sum_over_rows(gradient, bias_dtype, ctx.memory[1])
        biases = found.split(ctx.sizes) if count > 1 else (found,)
    x_gradient = None
    if operands:
        parts = upstream.split([len(each) for each in operands], 1)
        for part, weight in zip(parts, operands):
            x_gradient = cpu.product_with(part, weight.to(multiplied_in), x_gradient)
        x_gradient = x_gradient.to(gradient.dtype)
    return (x_gradient, *(None,) * (_FIXED - 1), *weights, *biases)
