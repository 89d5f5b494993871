"""A residual sum and its LayerNorm with PyTorch's passes, a chunk of rows at a time.

The sum and each row's mean and reciprocal standard deviation are saved; masks are drawn again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import SECOND_MASK, drop_, keep_scale, kept_chunks, row_chunks
from hubert_fast.torch_backend.bias_dropout_residual import dropped_gradient, residual_gradient, residual_sum

if TYPE_CHECKING:
    from hubert_fast.ops.residual_layer_norm import Arguments

_layer_norm_into = torch.ops.aten.native_layer_norm.out
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor, Optional[Tensor], Optional[Tensor]], list[Tensor]]:
    residual, weight, bias, update, update_bias, index = arguments[:6]
    summed, dtype, narrow = None, arguments.dtype, arguments.narrow
    if update is not None:
        summed = residual_sum(
            update.to(dtype), update_bias, residual, index, arguments.update_dropout_p, arguments.seed
        )
    x = _summed(arguments, summed)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape, dtype=dtype)
    copy = None if narrow is None else torch.empty_like(out, dtype=narrow)
    mean, rstd = (x.new_empty(len(x), dtype=wide) for _ in range(2))
    weight, bias = weight.to(wide), bias.to(wide)
    for rows, kept, scale in _output_masks(arguments, x):
        sample = _widened(x[rows], wide)
        results = out[rows] if sample.dtype == dtype else torch.empty_like(sample), mean[rows, None], rstd[rows, None]
        normed, _, _ = _layer_norm_into(
            sample, x.shape[1:], weight, bias, arguments.eps, out0=results[0], out1=results[1], out2=results[2]
        )
        drop_(out[rows] if sample.dtype == dtype else out[rows].copy_(normed), kept, scale)
        if copy is not None:
            copy[rows] = out[rows]
    return (out, copy, summed if save or arguments.with_sum else None), [mean, rstd] if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Each row's mean and reciprocal deviation."""
    dtype = arguments.residual.dtype if arguments.update is None else arguments.dtype
    return [(arguments.shape[:1], torch.promote_types(dtype, torch.float32))] * 2


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    residual, _, _, update, update_bias, index = arguments[:6]
    x_grad, weight_grad, bias_grad = _layer_norm_gradients(arguments, saved, gradients)
    residual_grad, update_grad, update_bias_grad = residual_gradient(x_grad, residual, index), None, None
    if arguments.one_gradient:
        update_grad = residual_grad
        if update_bias is not None:
            update_bias_grad = x_grad.sum(0, dtype=weight_grad.dtype).to(update_bias.dtype)
    elif update is not None:
        update_grad, update_bias_grad = dropped_gradient(
            x_grad, update_bias, arguments.update_dropout_p, arguments.seed
        )
        update_grad = update_grad.to(update.dtype)
    weight_grad, bias_grad = weight_grad.to(arguments.weight.dtype), bias_grad.to(arguments.bias.dtype)
    return residual_grad, weight_grad, bias_grad, update_grad, update_bias_grad


def _layer_norm_gradients(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, and of ``weight`` and ``bias`` in float32 or wider."""
    (summed, mean, rstd), (grad, copy_grad, sum_grad), wide = saved, arguments.upstream(gradients), saved[1].dtype
    x = _summed(arguments, summed)
    if grad is None:
        grad = x.new_zeros(x.shape, dtype=arguments.dtype)
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_grad, bias_grad = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    wide_weight, wide_bias = arguments.weight.to(wide), arguments.bias.to(wide)
    for rows, kept, scale in _output_masks(arguments, x):
        sample, statistics = _widened(x[rows], wide), (mean[rows, None], rstd[rows, None])
        upstream = grad[rows] if copy_grad is None else grad[rows] + copy_grad[rows]
        upstream = upstream.to(sample.dtype)
        if kept is not None:
            upstream = (upstream * kept).mul_(scale)
        passed, weights, biases = _layer_norm_backward(
            upstream, sample, x.shape[1:], *statistics, wide_weight, wide_bias, [True] * 3
        )
        x_grad[rows] = passed if sum_grad is None else passed.add_(sum_grad[rows])
        weight_grad += weights
        bias_grad += biases
    return x_grad, weight_grad, bias_grad


def _summed(arguments: Arguments, summed: Optional[Tensor]) -> Tensor:
    """What is normed, [rows, channels]: the sum where there is an update."""
    if arguments.update is not None:
        return summed
    residual, index = arguments.residual, arguments.index
    return residual.contiguous() if index is None else residual.index_select(0, index)


def _output_masks(arguments: Arguments, x: Tensor) -> Iterator[tuple[slice, Optional[Tensor], float]]:
    """Chunks of rows, the values that dropout keeps of what is normed there, and their scale."""
    chunks, p = row_chunks(x), arguments.output_dropout_p
    seed = None if arguments.seed is None else arguments.seed ^ SECOND_MASK
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, x.shape[1], p)):
        yield rows, kept, keep_scale(p)


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's CPU kernels take 16-bit rows with float32 parameters; its GPU kernels want one dtype."""
    return x if x.device.type == "cpu" else x.to(dtype)
