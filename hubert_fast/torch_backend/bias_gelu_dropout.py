"""dropout(gelu(x + bias)) with PyTorch's passes, a chunk of rows at a time so that only the first reads memory on a CPU.

Only ``x`` is saved; the backward adds the bias and draws the mask again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import drop_, keep_scale, kept_chunks, row_chunks

if TYPE_CHECKING:
    from hubert_fast.ops.bias_gelu_dropout import Arguments

_gelu_into = torch.ops.aten.gelu.out
_gelu_backward_into = torch.ops.aten.gelu_backward.grad_input


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, bias, dropout_p, seed = arguments
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks, scale = row_chunks(x), keep_scale(dropout_p)
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, x.shape[1], dropout_p)):
        _gelu_into(_biased(x[rows], bias), out=out[rows])
        drop_(out[rows], kept, scale)
    return (out,), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor]]:
    x, bias, dropout_p, seed = arguments
    (grad,) = gradients
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = torch.promote_types(x.dtype, torch.float32)
    bias_grad = None if bias is None else x.new_zeros(x.shape[1], dtype=wide)
    chunks, scale = row_chunks(x), keep_scale(dropout_p)
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, x.shape[1], dropout_p)):
        upstream = grad[rows] if kept is None else (grad[rows] * kept).mul_(scale)
        _gelu_backward_into(upstream, _biased(x[rows], bias), grad_input=x_grad[rows])
        if bias_grad is not None:
            bias_grad += x_grad[rows].sum(0, dtype=wide)
    return x_grad, None if bias is None else bias_grad.to(bias.dtype)


def _biased(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)
