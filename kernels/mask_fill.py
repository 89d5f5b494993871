"""Mask embedding, padding, bias and dropout in one pass, and the three gradients in another that draws the mask again.

Rows that are replaced are not read: of a batch with half of its frames masked, half of the input stays where it is.
"""

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

if TYPE_CHECKING:
    from hubert_fast.ops.mask_fill import Arguments

_ELEMENTS = 2048  # of a tile, each of which stands in several sums


@triton.jit
def _flags(mask, padding, row, rows):
    """Whether each row is masked, and whether it is neither that nor padding: [ROWS] bool."""
    exists = row < rows
    masked = tl.load(mask + row, mask=exists, other=0).to(tl.int1)
    live = masked == 0
    if padding is not None:
        live = live & (tl.load(padding + row, mask=exists, other=0).to(tl.int1) == 0)
    return masked, live


@triton.jit(do_not_specialize=["rows", "seed", "mask", "padding"])
def _forward(x, bias, embedding, mask, padding, seed, out, rows, threshold, scale, CHANNELS: tl.constexpr,
             DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    replacement = load_columns(embedding, column, CHANNELS)
    if bias is not None:
        shift = load_columns(bias, column, CHANNELS)
    if DROPOUT:
        key = tl.load(seed)
        column_bits = dropout.column_bits(key, column)[None]
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None]
        masked, live = _flags(mask, padding, row, rows)
        value = tl.load(x + offsets, mask=inside & live[:, None], other=0.0).to(tl.float32)
        if bias is not None:
            value += shift
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            value = tl.where(kept, value * scale, 0.0)
        value = tl.where(live[:, None], value, tl.where(masked[:, None], replacement, 0.0))
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "mask", "padding"])
def _backward(grad, mask, padding, seed, x_grad, parts, rows, threshold, scale, CHANNELS: tl.constexpr,
              DROPOUT: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              TILES: tl.constexpr):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    embedding_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if DROPOUT:
        key = tl.load(seed)
        column_bits = dropout.column_bits(key, column)[None]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        offsets = row.to(tl.int64)[:, None] * CHANNELS + column[None]
        masked, live = _flags(mask, padding, row, rows)
        upstream = tl.load(grad + offsets, mask=inside & (masked | live)[:, None], other=0.0).to(tl.float32)
        embedding_sums += tl.where(masked[:, None], upstream, 0.0)
        passed = tl.where(live[:, None], upstream, 0.0)
        if DROPOUT:
            kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
            passed = tl.where(kept, passed * scale, 0.0)
        tl.store(x_grad + offsets, passed.to(x_grad.dtype.element_ty), mask=inside)
        if VECTORS > 1:
            bias_sums += passed
    store_part(parts, 0, tl.sum(embedding_sums, 0), column, CHANNELS, VECTORS)
    if VECTORS > 1:
        store_part(parts, 1, tl.sum(bias_sums, 0), column, CHANNELS, VECTORS)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, bias, embedding, mask, padding = contiguous(*arguments[:5])
    out = torch.empty_like(x)
    tensors = {"x": x, "bias": bias, "embedding": embedding, "mask": mask, "padding": padding, "out": out}
    launch_tiles(_forward, x, {**tensors, **dropout.settings(arguments.dropout_p, arguments.seed)}, elements=_ELEMENTS)
    return (out,), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    bias, embedding = arguments.bias, arguments.embedding
    grad, mask, padding = contiguous(*gradients, arguments.mask, arguments.padding)
    x_grad = torch.empty_like(grad)
    vectors = [embedding] if bias is None else [embedding, bias]
    parts = new_parts(grad, len(grad), len(vectors))
    tensors = {"grad": grad, "mask": mask, "padding": padding, "x_grad": x_grad, "parts": parts}
    settings = {"VECTORS": len(vectors), **dropout.settings(arguments.dropout_p, arguments.seed)}
    launch_parts(_backward, grad, {**tensors, **settings}, elements=_ELEMENTS)
    embedding_grad, bias_grad = [*sum_parts(parts, vectors), None][:2]
    return x_grad, bias_grad, embedding_grad
