"""Mask embedding, padding, bias and dropout with PyTorch's passes, a chunk of rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast.reference.dropout import drop_, keep_scale, kept_chunks, row_chunks
from hubert_fast.torch_backend.bias_dropout_residual import dropped_gradient

if TYPE_CHECKING:
    from hubert_fast.ops.mask_fill import Arguments


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, bias, embedding, mask, padding, dropout_p, seed = arguments
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    embedding, bias = embedding.to(x.dtype), None if bias is None else bias.to(x.dtype)
    chunks, scale = row_chunks(x), keep_scale(dropout_p)
    for rows, kept in zip(chunks, kept_chunks(seed, chunks, x.shape[1], dropout_p)):
        filled = x[rows].clone() if bias is None else x[rows] + bias
        drop_(filled, kept, scale)
        if padding is not None:
            filled.masked_fill_(padding[rows, None], 0.0)
        torch.where(mask[rows, None], embedding, filled, out=out[rows])
    return (out,), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    (grad,), (_, bias, embedding, mask, padding, dropout_p, seed) = gradients, arguments
    embedding_grad = grad.masked_fill(~mask[:, None], 0.0).sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    replaced = mask if padding is None else mask | padding
    x_grad, bias_grad = dropped_gradient(grad.masked_fill(replaced[:, None], 0.0), bias, dropout_p, seed)
    return x_grad, bias_grad, embedding_grad.to(embedding.dtype)
