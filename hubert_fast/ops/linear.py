"""Products of rows with weights, as autocast makes them, with gradients of weights in their own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hubert_fast import backend
from hubert_fast.ops.arguments import autocast_dtype
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.weights import gradient_memory, in_dtype, is_lent, weight_gradient


def linear(
    x: Tensor,  # [..., in]
    weights: Sequence[Tensor],  # each [out, in]
    biases: Sequence[Tensor] = (),  # each [out]; none, or one a weight
    *,
    learn_biases: bool = True,
) -> Tensor:  # [..., sum of out]
    """``x weight^T + bias`` for one weight, or for several side by side in one product.

    Under autocast, and for weights that have memory lent (`weights.lend`), a weight in 16 bits is not cast where its copy is
    at hand, and a product gives its gradient in its own dtype rather than in 16 bits; of that there is no second derivative.
    Elsewhere this is `F.linear`, and everywhere where the formula of `feed_forward` was asked for (backend "reference").

    Args:
        x: ``[..., in]`` float.
        weights: ``[out, in]`` float each.
        biases: ``[out]`` float each, one a weight, or none at all.
        learn_biases: whether biases get their gradient here; False where somebody else has it at hand.

    Returns:
        ``[..., out of the first, out of the second...]``, in autocast's dtype where it is on, else in that of ``x``.
    """
    dtype = autocast_dtype(x.device)
    gains = (dtype is not None or all(map(is_lent, weights))) and not backend.is_reference("feed_forward")
    # Autocast leaves float64 alone.
    if not (gains and x.ndim == 2 and x.dtype != torch.float64 and is_plain_call((x, *weights, *biases))):
        biases = biases if learn_biases else [each.detach() for each in biases]
        if len(weights) == 1:
            return F.linear(x, weights[0], *biases)
        return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)
    return _Linear.apply(x, dtype or x.dtype, learn_biases, len(weights), *weights, *biases)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, learn_biases: bool, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        x, weight = x.to(dtype), in_dtype(weights, dtype)
        out = F.linear(x, weight, in_dtype(biases, dtype) if biases else None)
        wants_weights = any(ctx.needs_input_grad[4 : 4 + count])
        ctx.save_for_backward(x if wants_weights else None, weight if ctx.needs_input_grad[0] else None)
        ctx.dtypes = [weights[0].dtype, biases[0].dtype if biases else None]
        ctx.sizes = [len(each) for each in weights]
        ctx.wants_biases = learn_biases and any(ctx.needs_input_grad[4 + count :])
        ctx.memory = [gradient_memory(weights), gradient_memory(biases) if ctx.wants_biases else None]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        count = len(ctx.sizes)
        weights = biases = (None,) * count
        if x is not None:
            found = weight_gradient(gradient, x, ctx.dtypes[0], ctx.memory[0])
            weights = found.split(ctx.sizes) if count > 1 else (found,)
        if ctx.wants_biases:
            found = torch.sum(gradient, 0, dtype=ctx.dtypes[1], out=ctx.memory[1])
            biases = found.split(ctx.sizes) if count > 1 else (found,)
        x_gradient = None if weight is None else gradient @ weight
        return (x_gradient, None, None, None, *weights, *biases)[: len(ctx.needs_input_grad)]
