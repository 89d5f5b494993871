"""dropout(gelu(x + bias)) in one pass, and both gradients in another that draws the mask again."""

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
from hubert_fast.kernels.gelu import gelu, gelu_slope

if TYPE_CHECKING:
    from hubert_fast.ops.bias_gelu_dropout import Arguments


@triton.jit(do_not_specialize=["rows", "seed"])
def _forward(x, bias, seed, out, rows, threshold, scale, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr,
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
        if bias is not None:
            value += shift
        value = gelu(value, x.dtype.element_ty != tl.float32)
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            value = tl.where(kept, value * scale, 0.0)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed"])
def _backward(grad, x, bias, seed, x_grad, parts, rows, threshold, scale, CHANNELS: tl.constexpr, DROPOUT: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if bias is not None:
        shift = load_columns(bias, column, CHANNELS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DROPOUT:
        key = tl.load(seed)
        column_bits = dropout.column_bits(key, column)[None]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None]
        upstream = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += shift
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            upstream = tl.where(kept, upstream * scale, 0.0)
        passed = upstream * gelu_slope(value, x.dtype.element_ty != tl.float32)
        tl.store(x_grad + offsets, passed.to(x_grad.dtype.element_ty), mask=inside)
        sums += passed
    if bias is not None:
        store_part(parts, 0, tl.sum(sums, 0), column, CHANNELS, 1)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, bias = contiguous(arguments.x, arguments.bias)
    out = torch.empty_like(x)
    launch_tiles(
        _forward, x, {"x": x, "bias": bias, "out": out, **dropout.settings(arguments.dropout_p, arguments.seed)}
    )
    return (out,), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor]]:
    grad, x, bias = contiguous(*gradients, arguments.x, arguments.bias)
    x_grad = torch.empty_like(x)
    parts = new_parts(x, len(x), 0 if bias is None else 1)
    tensors = {"grad": grad, "x": x, "bias": bias, "x_grad": x_grad, "parts": parts}
    launch_parts(_backward, x, {**tensors, **dropout.settings(arguments.dropout_p, arguments.seed)})
    return x_grad, None if bias is None else sum_parts(parts, [bias])[0]
