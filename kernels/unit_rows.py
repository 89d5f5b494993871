"""Rows over their norms: label embeddings made ready for products, and the gradient of x / |x|."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.bfloat16_parts import split
from hubert_fast.kernels.class_groups import hash_of
from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch, next_power_of_2
from hubert_fast.reference.cosine_logits import NORM_MIN

NORM_MIN_CONSTANT = tl.constexpr(NORM_MIN)

# What rows and columns of directions are padded to, with zeros: products of whole blocks need no masks then.
_ROW_MULTIPLE = 128
_COLUMN_MULTIPLE = 64


class Directions(NamedTuple):
    """Rows over their clamped norms in three bfloat16 parts (see `bfloat16_parts`)."""

    parts: Tensor  # [3, padded rows, padded dim] bfloat16
    hashes: Tensor  # [rows] int64: equal for equal rows


def parts_shape(rows: int, dim: int) -> tuple[int, int, int]:
    return 3, _padded(rows, _ROW_MULTIPLE), _padded(dim, _COLUMN_MULTIPLE)


def _padded(size: int, multiple: int) -> int:
    return cdiv(size, multiple) * multiple


def contiguous_columns(x: Tensor) -> Tensor:
    """``x`` [rows, dim], copied if the elements of a row do not follow each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def unit_rows(
    x: Tensor,  # [rows, dim] float32, bfloat16 or float16, columns contiguous
) -> Directions:
    rows, dim = x.shape
    parts = torch.empty(parts_shape(rows, dim), dtype=torch.bfloat16, device=x.device)
    hashes = torch.empty(rows, dtype=torch.int64, device=x.device)
    width = next_power_of_2(parts.shape[2])
    block = _ROW_MULTIPLE if architecture(x) == INTERPRETER else max(1, min(8, 2048 // width))
    arguments = {
        "x": x,
        "parts": parts,
        "hashes": hashes,
        "rows": rows,
        "row_stride": x.stride(0),
        "part_stride": parts.stride(0),
        "DIM": dim,
        "PADDED_DIM": parts.shape[2],
        "BLOCK": block,
        "WIDTH": width,
    }
    launch(_unit_rows, lambda _: (parts.shape[1] // block,), arguments, [Blocks(warps=4)])
    return Directions(parts, hashes)


@triton.jit
def _unit_rows(
    x,  # [rows, DIM]
    parts,  # [3, padded rows, PADDED_DIM]
    hashes,  # [rows]
    rows,
    row_stride,
    part_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Whole rows, ``BLOCK`` of them a program; those beyond the last are zeros."""
    row_ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)[None, :]
    exists = row_ids < rows
    pointers = x + row_ids.to(tl.int64)[:, None] * row_stride + columns
    values = tl.load(pointers, mask=exists[:, None] & (columns < DIM), other=0.0)
    tl.store(hashes + row_ids, hash_of(values, columns), mask=exists)
    values = values.to(tl.float32)
    high, middle, low = split(tl.div_rn(values, tl.broadcast_to(_clamped_norms(values)[:, None], [BLOCK, WIDTH])))
    pointers = parts + row_ids[:, None] * PADDED_DIM + columns
    tl.store(pointers, high, mask=columns < PADDED_DIM)
    tl.store(pointers + part_stride, middle, mask=columns < PADDED_DIM)
    tl.store(pointers + 2 * part_stride, low, mask=columns < PADDED_DIM)


@triton.jit
def _clamped_norms(x):
    """[rows] of ``x`` [rows, columns]."""
    return tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), NORM_MIN_CONSTANT)


def unit_rows_backward(
    direction_grads: Tensor,  # [splits, rows, dim] float32: parts of the gradient of the directions, to be added
    x: Tensor,  # [rows, dim], columns contiguous
    factor: float,
    scale: Optional[Tensor] = None,  # [] float32: another factor, on the device
) -> Tensor:  # [rows, dim] in the dtype of x
    """The gradient of ``x / |x|``: what is orthogonal to the direction, over the norm, times ``factor`` and ``scale``.

    For a row of zeros the direction is 0 and so is the projection: the gradient passes over the clamped norm.
    """
    splits, rows, dim = direction_grads.shape
    result = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    width = next_power_of_2(dim)
    arguments = {
        "direction_grads": direction_grads,
        "x": x,
        "result": result,
        "scale": scale,
        "factor": factor,
        "rows": rows,
        "splits": splits,
        "row_stride": x.stride(0),
        "DIM": dim,
        "WIDTH": width,
        "AT_ONCE": 2 if architecture(x) == INTERPRETER else max(1, min(16, 2048 // width)),
    }
    launch(_unit_rows_backward, lambda _: (rows,), arguments, [Blocks(warps=4)])
    return result


@triton.jit(do_not_specialize=["rows", "splits"])
def _unit_rows_backward(
    direction_grads,  # [splits, rows, DIM]
    x,  # [rows, DIM]
    result,  # [rows, DIM]
    scale,  # [] or None
    factor,
    rows,
    splits,
    row_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One row a program; its parts of the gradient are added ``AT_ONCE`` at a time, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, AT_ONCE):
        split_ids = first + tl.arange(0, AT_ONCE)
        pointers = direction_grads + (split_ids.to(tl.int64)[:, None] * rows + row) * DIM + columns[None, :]
        total += tl.sum(tl.load(pointers, mask=(split_ids[:, None] < splits) & (columns[None, :] < DIM), other=0.0), 0)
    total *= factor
    if scale is not None:
        total *= tl.load(scale).to(tl.float32)
    values = tl.load(x + row * row_stride + columns, mask=columns < DIM, other=0.0).to(tl.float32)
    norm = tl.sum(_clamped_norms(values[None, :]), 0)
    direction = values / norm
    gradient = (total - direction * tl.sum(total * direction, 0)) / norm
    tl.store(result + row * DIM + columns, gradient.to(result.dtype.element_ty), mask=columns < DIM)
