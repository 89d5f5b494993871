"""residual + dropout(x + bias) in one pass, and the gradients of x and bias in another that draws the mask again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels import dropout
from hubert_fast.kernels.column_tiles import (
    contiguous,
    launch_parts,
    launch_tiles,
    load_columns,
    new_parts,
    store_part,
    sum_parts,
    within,
)
from hubert_fast.torch_backend.bias_dropout_residual import residual_gradient

if TYPE_CHECKING:
    from hubert_fast.ops.bias_dropout_residual import Arguments


@triton.jit(do_not_specialize=["rows", "seed"])
def _forward(x, bias, residual, index, seed, out, rows, threshold, scale, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if bias is not None:
        shift = load_columns(bias, column, CHANNELS)
    if DROPOUT:
        key = tl.load(seed)
        column_bits = dropout.column_bits(key, column)[None]
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None]
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if residual is not None:
            position = row.to(tl.int64)
            if index is not None:
                position = tl.load(index + row, mask=row < rows, other=0)
            added = tl.load(residual + position[:, None] * CHANNELS + column[None], mask=inside, other=0.0)
        if bias is not None:
            value += shift
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            value = tl.where(kept, value * scale, 0.0)
        if residual is not None:
            value += added.to(tl.float32)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed"])
def _backward(grad, seed, x_grad, parts, rows, threshold, scale, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DROPOUT:
        key = tl.load(seed)
        column_bits = dropout.column_bits(key, column)[None]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None]
        passed = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            passed = tl.where(kept, passed * scale, 0.0)
        tl.store(x_grad + offsets, passed.to(x_grad.dtype.element_ty), mask=inside)
        sums += passed
    if parts is not None:
        store_part(parts, 0, tl.sum(sums, 0), column, CHANNELS, 1)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, bias, residual, index = contiguous(*arguments[:4])
    out = torch.empty_like(x)
    tensors = {"x": x, "bias": bias, "residual": residual, "index": index, "out": out}
    launch_tiles(_forward, x, {**tensors, **dropout.settings(arguments.dropout_p, arguments.seed)})
    return (out,), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    (grad,), bias = gradients, arguments.bias
    residual_grad = residual_gradient(grad, arguments.residual, arguments.index)
    if bias is None and arguments.dropout_p == 0.0:
        return grad, None, residual_grad
    grad = grad.contiguous()
    x_grad = torch.empty_like(grad)
    parts = new_parts(grad, len(grad), 0 if bias is None else 1)
    tensors = {"grad": grad, "x_grad": x_grad, "parts": parts}
    launch_parts(_backward, grad, {**tensors, **dropout.settings(arguments.dropout_p, arguments.seed)})
    return x_grad, None if bias is None else sum_parts(parts, [bias])[0], residual_grad
