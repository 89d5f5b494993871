"""Vectors of an attention head in the registers of a program: loaded, stored and multiplied in two tiles.

A tile's width is a power of two, so head_dim columns take WIDTH and REST (0: none) of them: 80 are 64 + 16 rather than 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hubert_fast.kernels.launch import next_power_of_2


def tiles(head_dim: int) -> tuple[int, int]:
    """Columns of the two tiles that hold a vector: powers of two, 16 at least (a tensor core's depth) or 0."""
    power = next_power_of_2(head_dim)
    if power <= 16 or power == head_dim:
        return max(power, 16), 0
    rest = max(next_power_of_2(head_dim - power // 2), 16)
    return (power // 2, rest) if rest < power // 2 else (power, 0)


@triton.jit
def _away(row, places, STRIDE: tl.constexpr):
    """How far away, in values, each row begins: rows of STRIDE values, numbered ``row`` or, if there are any, ``places``."""
    if places is None:
        away = row * STRIDE
    else:
        away = places[:, None].to(tl.int64) * STRIDE
    return away


@triton.jit
def _load_tile(
    first,
    rows,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    places,
):
    """[BLOCK, WIDTH]: columns from FIRST of the rows from pointer ``first``; 0 past ``rows`` (where MASKED) and HEAD_DIM."""
    row, column = tl.arange(0, BLOCK)[:, None], FIRST + tl.arange(0, WIDTH)[None]
    pointers = first + _away(row, places, STRIDE) + column
    if FIRST + WIDTH > HEAD_DIM:
        tile = tl.load(pointers, mask=(row < rows) & (column < HEAD_DIM), other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=row < rows, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load(
    first,
    rows,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    places=None,
):
    """The vectors of BLOCK rows as the pair of their tiles; without REST the second is not used.

    The rows follow one another from ``first`` on, or lie at ``places`` ([BLOCK]) from there; ``rows`` of them are there.
    """
    main = _load_tile(first, rows, STRIDE, BLOCK, 0, WIDTH, HEAD_DIM, MASKED, places)
    if REST > 0:
        rest = _load_tile(first, rows, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, MASKED, places)
    else:
        rest = main
    return main, rest


@triton.jit
def _store_tile(
    first,
    tile,
    rows,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    places,
):
    row, column = tl.arange(0, BLOCK)[:, None], FIRST + tl.arange(0, WIDTH)[None]
    mask = (row < rows) & (column < HEAD_DIM)
    tl.store(first + _away(row, places, STRIDE) + column, tile.to(first.dtype.element_ty), mask=mask)


@triton.jit
def store(
    first,
    vectors,
    rows,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    places=None,
):
    """Store the pair of tiles where `load` would read it."""
    _store_tile(first, vectors[0], rows, STRIDE, BLOCK, 0, WIDTH, HEAD_DIM, places)
    if REST > 0:
        _store_tile(first, vectors[1], rows, STRIDE, BLOCK, WIDTH, REST, HEAD_DIM, places)


@triton.jit
def zeros(BLOCK: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    return tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, REST if REST > 0 else 1], tl.float32)


@triton.jit
def products(left, right, REST: tl.constexpr, PRECISION: tl.constexpr):
    """left right^T, [left rows, right rows]: a sum over head_dim."""
    sums = tl.dot(left[0], right[0].T, input_precision=PRECISION)
    if REST > 0:
        sums = tl.dot(left[1], right[1].T, sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_weighted(sums, weights, vectors, REST: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights vectors: ``weights`` is [sums' rows, vectors' rows]."""
    weights = weights.to(vectors[0].dtype)
    main = tl.dot(weights, vectors[0], sums[0], input_precision=PRECISION)
    rest = sums[1]
    if REST > 0:
        rest = tl.dot(weights, vectors[1], rest, input_precision=PRECISION)
    return main, rest


@triton.jit
def scaled(vectors, factors):
    return vectors[0] * factors, vectors[1] * factors


@triton.jit
def where(condition, vectors):
    """The vectors where ``condition`` holds, else 0."""
    return tl.where(condition, vectors[0], 0.0), tl.where(condition, vectors[1], 0.0)


@triton.jit
def row_sums(left, right, REST: tl.constexpr):
    """[rows]: the inner product of each row of ``left`` with that of ``right``."""
    sums = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    if REST > 0:
        sums += tl.sum(left[1].to(tl.float32) * right[1].to(tl.float32), 1)
    return sums


@triton.jit
def column_sums(vectors):
    """The sum of all rows."""
    return tl.sum(vectors[0], 0), tl.sum(vectors[1], 0)


@triton.jit
def store_row(first, row, WIDTH: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store ``row``, a pair as of `column_sums`, from the pointer ``first`` on."""
    column = tl.arange(0, WIDTH)
    tl.store(first + column, row[0], mask=column < HEAD_DIM)
    if REST > 0:
        column = WIDTH + tl.arange(0, REST)
        tl.store(first + column, row[1], mask=column < HEAD_DIM)
