"""dropout(gelu(x + bias)) in one pass, and both gradients in another that draws the mask again."""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels import dropout
from hubert_fast.kernels.column_tiles import (
    blocks,
    contiguous,
    load_columns,
    new_parts,
    parts_of,
    store_part,
    sum_parts,
    within,
)
from hubert_fast.kernels.gelu import gelu, gelu_slope
from hubert_fast.kernels.launch import architecture, launch


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


def bias_gelu_dropout(x: Tensor, bias: Optional[Tensor], dropout_p: float, seed: Optional[Tensor]) -> Tensor:
    """``x`` [rows, channels], ``bias`` [channels] or None, ``seed`` [] int64: [rows, channels] in the dtype of ``x``."""
    x, bias = contiguous(x, bias)
    out = torch.empty_like(x)
    arguments = {"x": x, "bias": bias, "out": out} | _settings(x, dropout_p, seed)

    def grid(sizes):
        return triton.cdiv(len(x), sizes["ROWS"] * sizes["TILES"]), triton.cdiv(x.shape[1], sizes["COLUMNS"])

    launch(_forward, grid, arguments, blocks(architecture(x), x.shape[1]))
    return out


def bias_gelu_dropout_backward(
    grad: Tensor, x: Tensor, bias: Optional[Tensor], dropout_p: float, seed: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of ``x`` and ``bias``."""
    grad, x, bias = contiguous(grad, x, bias)
    x_grad = torch.empty_like(x)
    parts = new_parts(x, len(x), 0 if bias is None else 1)
    arguments = {"grad": grad, "x": x, "bias": bias, "x_grad": x_grad, "parts": parts}

    def grid(sizes):
        return parts_of(len(x)), triton.cdiv(x.shape[1], sizes["COLUMNS"])

    launch(_backward, grid, arguments | _settings(x, dropout_p, seed), blocks(architecture(x), x.shape[1]))
    return x_grad, None if bias is None else sum_parts(parts, [bias])[0]


def _settings(x: Tensor, dropout_p: float, seed: Optional[Tensor]) -> dict[str, Any]:
    return {
        "seed": seed,
        "rows": len(x),
        "threshold": dropout.threshold(dropout_p),
        "scale": dropout.scale(dropout_p),
        "CHANNELS": x.shape[1],
        "DROPOUT": dropout_p > 0.0,
    }
