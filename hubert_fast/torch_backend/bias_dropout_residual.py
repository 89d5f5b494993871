"""residual + dropout(x + bias) with PyTorch's passes, a chunk of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import drop_, keep_scale, kept_chunks, row_chunks

if TYPE_CHECKING:
    from hubert_fast.ops.bias_dropout_residual import Arguments


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    return (residual_sum(*arguments),), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    (grad,), (_, bias, residual, index, dropout_p, seed) = gradients, arguments
    residual_grad = residual_gradient(grad, residual, index)
    if bias is None and dropout_p == 0.0:
        return grad, None, residual_grad
    return *dropped_gradient(grad, bias, dropout_p, seed), residual_grad


def residual_sum(
    x: Tensor,
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    index: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks, scale = row_chunks(x), keep_scale(dropout_p)
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, x.shape[1], dropout_p)):
        if bias is None:
            out[rows] = x[rows]
        else:
            torch.add(x[rows], bias.to(x.dtype), out=out[rows])
        drop_(out[rows], kept, scale)
        if residual is not None:
            out[rows] += (residual[rows] if index is None else residual.index_select(0, index[rows])).to(x.dtype)
    return out


def dropped_gradient(
    grad: Tensor,  # [rows, channels]: of dropout(x + bias)
    bias: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of ``x``, in the dtype of ``grad``, and of ``bias``."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    x_grad = torch.empty_like(grad, memory_format=torch.contiguous_format)
    bias_grad = None if bias is None else grad.new_zeros(grad.shape[1], dtype=wide)
    chunks, scale = row_chunks(grad), keep_scale(dropout_p)
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, grad.shape[1], dropout_p)):
        drop_(x_grad[rows].copy_(grad[rows]), kept, scale)
        if bias_grad is not None:
            bias_grad += x_grad[rows].sum(0, dtype=wide)
    return x_grad, None if bias is None else bias_grad.to(bias.dtype)


def residual_gradient(grad: Tensor, residual: Optional[Tensor], index: Optional[Tensor]) -> Optional[Tensor]:
    """The gradient of ``residual`` [positions, channels], where there is one: that of each row at its position, 0 elsewhere."""
    if residual is None:
        return None
    grad = grad.to(residual.dtype)
    return grad if index is None else grad.new_zeros(residual.shape).index_copy_(0, index, grad)
