"""A residual sum and its LayerNorm with PyTorch's passes, a chunk of rows at a time.

The sum and each row's mean and reciprocal standard deviation are saved; masks are drawn again in the backward.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import keep_scale
from hubert_fast.torch_backend.bias_dropout_residual import (
    bias_dropout_residual,
    dropped_gradient,
    residual_gradient,
)
from hubert_fast.torch_backend.dropout_mask import SECOND_MASK, drop_, kept_chunks, row_chunks

_layer_norm_into = torch.ops.aten.native_layer_norm.out
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def residual_layer_norm(
    residual: Tensor,  # [positions, channels]
    weight: Tensor,
    bias: Tensor,
    update: Optional[Tensor],  # [rows, channels]
    update_bias: Optional[Tensor],
    index: Optional[Tensor],
    update_dropout_p: float,
    output_dropout_p: float,
    seed: Optional[Tensor],
    eps: float,
    dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor]:
    """The normed sum in ``dtype``, the sum (None without an update, and unless ``keep_sum``), and each row's mean and
    reciprocal deviation."""
    summed = None
    if update is not None:
        summed = bias_dropout_residual(update.to(dtype), update_bias, residual, index, update_dropout_p, seed)
    x = _summed(residual, summed, index)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(len(x), dtype=wide) for _ in range(2))
    weight, bias = weight.to(wide), bias.to(wide)
    chunks, scale = row_chunks(x), keep_scale(output_dropout_p)
    for rows, kept in zip(chunks, kept_chunks(_second(seed), chunks, x.shape[1], output_dropout_p)):
        sample = _widened(x[rows], wide)
        results = out[rows] if sample.dtype == dtype else torch.empty_like(sample), mean[rows, None], rstd[rows, None]
        normed, _, _ = _layer_norm_into(
            sample, x.shape[1:], weight, bias, eps, out0=results[0], out1=results[1], out2=results[2]
        )
        drop_(out[rows] if sample.dtype == dtype else out[rows].copy_(normed), kept, scale)
    return out, summed if keep_sum else None, mean, rstd


def residual_layer_norm_backward(
    grad: Tensor,  # [rows, channels]: of the normed sum
    sum_grad: Optional[Tensor],  # [rows, channels]: of the sum
    residual: Tensor,
    summed: Optional[Tensor],
    index: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    update_bias: Optional[Tensor],
    update_dropout_p: float,
    output_dropout_p: float,
    seed: Optional[Tensor],
    update_dtype: torch.dtype,
    one_gradient: bool,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor], Tensor, Tensor]:
    """Gradients of ``residual``, of the update (None without one, and where it is that of ``residual``: ``one_gradient``),
    of ``update_bias``, ``weight`` and ``bias``."""
    x_grad, weight_grad, bias_grad = _layer_norm_gradients(
        grad, sum_grad, _summed(residual, summed, index), mean, rstd, weight, bias, output_dropout_p, seed
    )
    residual_grad = x_grad.to(residual.dtype) if index is None else residual_gradient(x_grad, residual, index)
    update_grad = update_bias_grad = None
    if one_gradient:
        if update_bias is not None:
            update_bias_grad = x_grad.sum(0, dtype=mean.dtype).to(update_bias.dtype)
    elif summed is not None:
        update_grad, update_bias_grad = dropped_gradient(x_grad, update_bias, update_dropout_p, seed)
        update_grad = update_grad.to(update_dtype)
    return residual_grad, update_grad, update_bias_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype)


def _layer_norm_gradients(
    grad: Tensor,
    sum_grad: Optional[Tensor],
    x: Tensor,  # [rows, channels]: the sum
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    output_dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``."""
    wide = mean.dtype
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_grad, bias_grad = (x.new_zeros(x.shape[1], dtype=wide) for _ in range(2))
    wide_weight, wide_bias = weight.to(wide), bias.to(wide)
    chunks, scale = row_chunks(x), keep_scale(output_dropout_p)
    for rows, kept in zip(chunks, kept_chunks(_second(seed), chunks, x.shape[1], output_dropout_p)):
        sample, statistics = _widened(x[rows], wide), (mean[rows, None], rstd[rows, None])
        upstream = grad[rows].to(sample.dtype)
        if kept is not None:
            upstream = (upstream * kept).mul_(scale)
        passed, weights, biases = _layer_norm_backward(
            upstream, sample, x.shape[1:], *statistics, wide_weight, wide_bias, [True] * 3
        )
        x_grad[rows] = passed if sum_grad is None else passed.add_(sum_grad[rows])
        weight_grad += weights
        bias_grad += biases
    return x_grad, weight_grad, bias_grad


def _summed(residual: Tensor, summed: Optional[Tensor], index: Optional[Tensor]) -> Tensor:
    if summed is not None:
        return summed
    return residual.contiguous() if index is None else residual.index_select(0, index)


def _second(seed: Optional[Tensor]) -> Optional[Tensor]:
    return None if seed is None else seed ^ SECOND_MASK


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's CPU kernels take 16-bit rows with float32 parameters; its GPU kernels want one dtype."""
    return x if x.device.type == "cpu" else x.to(dtype)
