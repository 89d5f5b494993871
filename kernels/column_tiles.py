"""How passes over ``[rows, channels]`` are cut up, and the sums over rows that their backwards need.

A program works on some columns of many rows, a tile of ROWS at a time, so that what belongs to columns (parameters, dropout bits)
is loaded and drawn once. For sums over rows the rows are dealt to a number of programs that depends on nothing but their count;
each writes the sum of its own, and `sum_parts` adds those in order, so that results repeat to the bit.

Kernels are not specialised to a row count, nor to the alignment of a seed or of flags, which may be views of longer tensors: no
batch compiles anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch, next_power_of_2

# Programs over which the rows are dealt, and the rows that are worth one. The partial sums of 128 are 2% of the traffic of a pass
# over 9,000 rows.
_PARTS = 128
_ROWS_OF_A_PART = 32

_ELEMENTS = 4096  # of a tile in 16 bits; half as many in 32


def parts_of(rows: int, most: int = _PARTS) -> int:
    """How many programs share ``rows`` where their sum is wanted."""
    return min(most, cdiv(rows, _ROWS_OF_A_PART))


@functools.cache
def _blocks(arch: int, channels: int, elements: int) -> list[Blocks]:
    """Tiles for passes without sums along a row: ROWS x COLUMNS at a time, TILES times a program where it has no loop.

    ``elements`` is what a tile best has: less for kernels that hold several sums in registers.
    """
    if arch == INTERPRETER:
        return [Blocks({"ROWS": 16, "COLUMNS": 64, "TILES": 2}, warps=1)]
    columns = next((each for each in (1024, 512, 256) if channels % each == 0), min(1024, next_power_of_2(channels)))
    tiles = 4 if columns == 1024 else 2  # rows that share a program's column bits, against programs that fill the GPU
    sizes = [(elements, tiles, 4), (elements // 2, tiles, 4), (elements, tiles, 2), (2 * elements, tiles, 8)]
    return [
        Blocks({"ROWS": max(1, size // columns), "COLUMNS": columns, "TILES": count}, warps=warps)
        for size, count, warps in sizes
    ]


@triton.jit
def within(row, rows, column, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of the tile of ``row`` ([ROWS]) and ``column`` ([COLUMNS]) exist."""
    inside = (row < rows)[:, None]
    if CHANNELS % COLUMNS != 0:
        inside = inside & (column < CHANNELS)[None]
    return inside


@triton.jit
def load_columns(vector, column, CHANNELS: tl.constexpr):
    """A [CHANNELS] parameter at ``column``, [1, COLUMNS] float32."""
    return tl.load(vector + column, mask=column < CHANNELS, other=0.0).to(tl.float32)[None]


@triton.jit
def store_part(parts, vector, sums, column, CHANNELS: tl.constexpr, VECTORS: tl.constexpr):
    """This program's sum over its rows: ``parts`` is [programs of axis 0, VECTORS, CHANNELS], ``sums`` [COLUMNS]."""
    first = (tl.program_id(0) * VECTORS + vector) * CHANNELS
    tl.store(parts + first + column, sums, mask=column < CHANNELS)


@triton.jit(do_not_specialize=["count"])
def _sum_parts(parts, first, second, third, count, CHANNELS: tl.constexpr, VECTORS: tl.constexpr, PARTS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    vector = tl.program_id(1)
    part = tl.arange(0, PARTS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    sums = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, count, PARTS):
        pointers = parts + ((start + part) * VECTORS + vector) * CHANNELS + column[None]
        sums += tl.load(pointers, mask=(start + part < count) & inside[None], other=0.0)
    total = tl.sum(sums, 0)
    if vector == 0:
        tl.store(first + column, total.to(first.dtype.element_ty), mask=inside)
    if VECTORS > 1:
        if vector == 1:
            tl.store(second + column, total.to(second.dtype.element_ty), mask=inside)
    if VECTORS > 2:
        if vector == 2:
            tl.store(third + column, total.to(third.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Sums of ``parts`` ([programs, vectors, channels] float32), vector i of them in the dtype of ``like[i]``; at most 3."""
    count, vectors, channels = parts.shape
    results = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in like]
    first, second, third = [*results, None, None][:3]
    arguments = {"parts": parts, "first": first, "second": second, "third": third, "count": count}
    constants = {"CHANNELS": channels, "VECTORS": vectors}
    arch = architecture(parts)
    candidates = [Blocks({"PARTS": 8, "COLUMNS": 32}, warps=1)]
    if arch != INTERPRETER:
        candidates = [Blocks({"PARTS": 64, "COLUMNS": 32}, warps=4), Blocks({"PARTS": 128, "COLUMNS": 32}, warps=8)]
    launch(_sum_parts, lambda sizes: (cdiv(channels, sizes["COLUMNS"]), vectors), arguments | constants, candidates)
    return results


def contiguous(*tensors: Optional[Tensor]) -> list[Optional[Tensor]]:
    """Copies of those that are not, so that kernels need no strides."""
    return [None if each is None else each.contiguous() for each in tensors]


def new_parts(x: Tensor, rows: int, vectors: int, most: int = _PARTS) -> Optional[Tensor]:
    """Room for partial sums over ``rows`` rows, or None where no vector is wanted."""
    if vectors == 0:
        return None
    return x.new_empty(parts_of(rows, most), vectors, x.shape[1], dtype=torch.float32)


def launch_tiles(kernel: Any, x: Tensor, arguments: Mapping[str, Any], *, elements: int = _ELEMENTS) -> None:
    """Start ``kernel`` on tiles of the matrix ``x``: a forward, which sums nothing."""
    rows, channels = x.shape

    def grid(sizes: Mapping[str, int]) -> tuple[int, ...]:
        return cdiv(rows, sizes["ROWS"] * sizes["TILES"]), cdiv(channels, sizes["COLUMNS"])

    _launch(kernel, grid, x, arguments, elements)


def launch_parts(kernel: Any, x: Tensor, arguments: Mapping[str, Any], *, elements: int = _ELEMENTS) -> None:
    """Start ``kernel`` with the rows of ``x`` dealt over programs that sum, a part each (`new_parts`): a backward."""
    rows, channels = x.shape

    def grid(sizes: Mapping[str, int]) -> tuple[int, ...]:
        return parts_of(rows), cdiv(channels, sizes["COLUMNS"])

    _launch(kernel, grid, x, arguments, elements)


def _launch(kernel: Any, grid: Callable, x: Tensor, arguments: Mapping[str, Any], elements: int) -> None:
    rows, channels = x.shape
    blocks = _blocks(architecture(x), channels, 2 * elements // x.element_size())
    launch(kernel, grid, {**arguments, "rows": rows, "CHANNELS": channels}, blocks)
