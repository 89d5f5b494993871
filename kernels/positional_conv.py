"""The convolutional positional embedding on packed rows: gelu(conv(x) + bias) + x and its gradients as implicit GEMMs.

A group of a grouped convolution is a product of depth taps * width (width: channels of the group), narrow for tensor cores: 48
columns. So FOLD neighbouring frames of a sequence, a run, are computed as one row of FOLD * width columns. Run q of frames t to
t + FOLD - 1 sees frames t - before to t - before + TAPS + FOLD - 2, and column (s, o) of its filters is filter o delayed by s:

    z[t + s, o] = sum over j and c of x[t - before + j, c] W[j - s, c, o]        (W is 0 where it has no tap j - s)

Depth grows to (taps + FOLD - 1) * width, by 3% for 5 frames of 128 taps, while 240 of 256 columns are used instead of 48 of 64,
and every value of x that is brought to the tensor cores serves 5 frames. `_runs` says which frames a run has and where its
sequence lies, so a tile of runs spans sequences. Loads of x and of the filters repeat themselves from j to j + 1. Under Triton
3.9 L1 may serve them (".ca", in SASS LDGSTS.E.128); Triton 3.6 drops that (LDGSTS.E.BYPASS.128), and all come from L2.

The gradient of x is the same product of the preactivation's gradient with the taps reversed and the filters transposed. That of
the filters is, a group, the product over all runs of what a run sees of x with the preactivation's gradient of its frames: entry
(s, o) by (j, c) of it is what the frames at place s of their runs add to W[j - s, c, o], and the FOLD parts are summed after.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast import tf32
from hubert_fast.kernels import weight_norm
from hubert_fast.kernels.column_tiles import contiguous
from hubert_fast.kernels.gelu import gelu, gelu_slope
from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch
from hubert_fast.switches import switches

if TYPE_CHECKING:
    from hubert_fast.ops.positional_conv import Arguments

# Programs that share the sum over rows for the gradient of the bias, whatever the GPU: their order decides the last bits.
PARTS = 64

_VARYING = ["rows", "sequences", "runs", "room"]  # from batch to batch: nothing is compiled anew for them


@triton.jit
def _first_run(offset, sequence, FOLD: tl.constexpr):
    """The first run of the sequences that start at rows ``offset``; a run of one frame is its row."""
    return offset if FOLD == 1 else offset // FOLD + sequence


@triton.jit(do_not_specialize=_VARYING)
def _runs(offsets, table, rows, sequences, runs, FOLD: tl.constexpr, BLOCK: tl.constexpr):
    """For each run its first row, where its sequence starts and where its frames end: ``table`` [3, runs] int32.

    Where a sequence's runs begin, `_first_run`, leaves room for those of all before it and follows from its offset alone, so
    that each run finds its sequence by itself, in a binary search. Dead rows are searched as one sequence more. Their runs have
    a sequence that starts where they end, so they see nothing; runs too many start and end at ``rows``.
    """
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)  # the last that is known to begin no later than the run
    count = sequences + 1  # from there on, one of these is the run's
    while count > 1:
        middle = sequence + count // 2
        begins = _first_run(tl.load(offsets + middle), middle, FOLD)
        sequence = tl.where(begins <= run, middle, sequence)
        count -= count // 2
    live = sequence < sequences
    start = tl.load(offsets + sequence).to(tl.int32)
    end = tl.load(offsets + sequence + 1, mask=live, other=0).to(tl.int32)
    end = tl.where(live, end, rows)
    first = start + (run - _first_run(start, sequence, FOLD)) * FOLD
    inside = first < end
    tl.store(table + run, tl.where(inside, first, rows), mask=run < runs)
    tl.store(table + runs + run, tl.where(inside & live, start, rows), mask=run < runs)
    tl.store(table + 2 * runs + run, tl.where(inside, end, rows), mask=run < runs)


@triton.jit
def _halves(tile):
    """[rows, columns] to the left and right [rows, columns / 2]."""
    pairs = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(pairs, [0, 2, 1]))


@triton.jit
def _finish(sums, column, group, first, start, end, bias, residual, out, preactivation, CHANNELS: tl.constexpr,
            WIDTH: tl.constexpr, FOLD: tl.constexpr):  # fmt: skip
    """Bias, GELU and residual on the columns from ``column`` of a tile of runs, or without a bias the residual alone."""
    column += tl.arange(0, sums.shape[1])
    delay, target = column // WIDTH, column % WIDTH
    live = (start <= first)[:, None]
    inside = (first[:, None] + delay[None] < end[:, None]) & (delay < FOLD)[None]
    place = first.to(tl.int64)[:, None] * CHANNELS + (group * WIDTH + delay * CHANNELS + target)[None]
    result = tl.load(residual + place, mask=inside & live, other=0.0).to(tl.float32)
    if bias is None:
        result += sums
    else:
        z = sums + tl.load(bias + group * WIDTH + target, mask=delay < FOLD, other=0.0).to(tl.float32)[None]
        if preactivation is not None:
            tl.store(preactivation + place, z, mask=inside)
        LOW_PRECISION: tl.constexpr = out.dtype.element_ty != tl.float32
        result = tl.where(live, gelu(z, LOW_PRECISION) + result, 0.0)
    tl.store(out + place, result, mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def _convolve(x, filters, bias, residual, table, out, preactivation, runs, room, CHANNELS: tl.constexpr,
              WIDTH: tl.constexpr, TAPS: tl.constexpr, BEFORE: tl.constexpr, FOLD: tl.constexpr, BACKWARD: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
              BLOCK_DEPTH: tl.constexpr):  # fmt: skip
    """gelu(conv(x) + bias) + residual, its preactivation too where that is given; BACKWARD: conv(x) + residual, taps reversed.

    A tile is BLOCK_RUNS runs by BLOCK_COLUMNS columns of one group. ``filters`` is [groups, TAPS, WIDTH (in), WIDTH (out)];
    BACKWARD exchanges in and out.
    """
    BLOCKS: tl.constexpr = (FOLD * WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS  # more than 1 only where FOLD is 1
    DEPTH: tl.constexpr = (TAPS + FOLD - 1) * WIDTH
    group = tl.program_id(1) // BLOCKS
    run = tl.program_id(0) * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    first = tl.load(table + run, mask=run < runs, other=0)
    start = tl.load(table + room + run, mask=run < runs, other=0)
    end = tl.load(table + 2 * room + run, mask=run < runs, other=0)
    column = (tl.program_id(1) % BLOCKS) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    delay, target = column // WIDTH, column % WIDTH

    low, high = (start - first + BEFORE)[:, None], (end - first + BEFORE)[:, None]
    frames = x + group * WIDTH + first.to(tl.int64)[:, None] * CHANNELS
    if BACKWARD:
        columns = filters + group * TAPS * WIDTH * WIDTH + (delay * WIDTH * WIDTH + target * WIDTH)[None]
    else:
        columns = filters + group * TAPS * WIDTH * WIDTH + (target - delay * WIDTH * WIDTH)[None]
    nearest, farthest = delay[None], tl.where(delay < FOLD, delay + TAPS, 0)[None]

    sums = tl.zeros([BLOCK_RUNS, BLOCK_COLUMNS], tl.float32)
    for depth in range(0, DEPTH, BLOCK_DEPTH):
        place = depth + tl.arange(0, BLOCK_DEPTH)
        tap, source = place // WIDTH, place % WIDTH
        shift = ((tap - BEFORE) * CHANNELS + source)[None]
        seen = (tap[None] >= low) & (tap[None] < high)
        values = tl.load(frames + shift, mask=seen, other=0.0, cache_modifier=".ca")
        if BACKWARD:
            offset = (TAPS - 1 - tap) * WIDTH * WIDTH + source
        else:
            offset = place * WIDTH
        has_tap = (tap[:, None] >= nearest) & (tap[:, None] < farthest)
        weights = tl.load(columns + offset[:, None], mask=has_tap, other=0.0, cache_modifier=".ca")
        sums = tl.dot(values, weights, sums, input_precision=PRECISION)

    column = (tl.program_id(1) % BLOCKS) * BLOCK_COLUMNS
    if BLOCK_COLUMNS == 256:
        left, right = _halves(sums)
        a, b = _halves(left)
        c, d = _halves(right)
        _finish(a, column, group, first, start, end, bias, residual, out, preactivation, CHANNELS, WIDTH, FOLD)
        _finish(b, column + 64, group, first, start, end, bias, residual, out, preactivation, CHANNELS, WIDTH, FOLD)
        _finish(c, column + 128, group, first, start, end, bias, residual, out, preactivation, CHANNELS, WIDTH, FOLD)
        _finish(d, column + 192, group, first, start, end, bias, residual, out, preactivation, CHANNELS, WIDTH, FOLD)
    else:
        _finish(sums, column, group, first, start, end, bias, residual, out, preactivation, CHANNELS, WIDTH, FOLD)


@triton.jit(do_not_specialize=_VARYING)
def _activation_gradient(grad, preactivation, offsets, z_grad, parts, rows, sequences, CHANNELS: tl.constexpr,
                         PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):  # fmt: skip
    """Gradient of the preactivation, 0 in dead rows, and parts of its sum over rows: ``parts`` [PARTS, CHANNELS]."""
    LOW_PRECISION: tl.constexpr = z_grad.dtype.element_ty != tl.float32
    live = tl.load(offsets + sequences).to(tl.int32)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None]
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_ROWS, rows, PARTS * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)[:, None]
        place = row.to(tl.int64) * CHANNELS + channels
        mask = (row < live) & (channels < CHANNELS)
        z = tl.load(preactivation + place, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        result = upstream * gelu_slope(z, LOW_PRECISION)
        total += result
        tl.store(z_grad + place, result, mask=(row < rows) & (channels < CHANNELS))
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    tl.store(parts + tl.program_id(0) * CHANNELS + channels, tl.sum(total, 0), mask=channels < CHANNELS)


@triton.jit(do_not_specialize=_VARYING)
def _filters_gradient(x, z_grad, table, parts, runs, room, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                      TAPS: tl.constexpr, BEFORE: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_RUNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):  # fmt: skip
    """``parts`` [FOLD, groups, WIDTH (out), TAPS, WIDTH (in)] float32: what each frame of the runs adds.

    A tile is BLOCK_COLUMNS columns of runs by BLOCK_DEPTH (frame that a run sees, input channel) of one group.
    """
    BLOCKS: tl.constexpr = (FOLD * WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    group = tl.program_id(1) // BLOCKS
    column = (tl.program_id(1) % BLOCKS) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    delay, target = column // WIDTH, column % WIDTH
    place = tl.program_id(0) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    tap, source = place // WIDTH, place % WIDTH
    shift = ((tap - BEFORE) * CHANNELS + source)[None]
    own = (delay * CHANNELS + target)[None]

    sums = tl.zeros([BLOCK_COLUMNS, BLOCK_DEPTH], tl.float32)
    if runs > 0:  # said although it is so: else ptxas serialises the products of a loop that might not run
        run = tl.arange(0, BLOCK_RUNS)
        first = tl.load(table + run, mask=run < runs, other=0)
        start = tl.load(table + room + run, mask=run < runs, other=0)
        end = tl.load(table + 2 * room + run, mask=run < runs, other=0)
        for block in range(0, runs, BLOCK_RUNS):
            frames = group * WIDTH + first.to(tl.int64)[:, None] * CHANNELS
            low, high = (start - first + BEFORE)[:, None], (end - first + BEFORE)[:, None]
            seen = (tap[None] >= low) & (tap[None] < high)
            values = tl.load(x + frames + shift, mask=seen, other=0.0, cache_modifier=".ca")
            inside = (first[:, None] + delay[None] < end[:, None]) & (delay < FOLD)[None]
            upstream = tl.load(z_grad + frames + own, mask=inside, other=0.0)
            sums = tl.dot(tl.trans(upstream), values, sums, input_precision=PRECISION)
            # A block ahead, so that the loads of x do not wait for them.
            run = block + BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
            first = tl.load(table + run, mask=run < runs, other=0)
            start = tl.load(table + room + run, mask=run < runs, other=0)
            end = tl.load(table + 2 * room + run, mask=run < runs, other=0)
    part = (delay * CHANNELS + group * WIDTH + target)[:, None] * TAPS - delay[:, None]
    has_tap = (tap[None] >= delay[:, None]) & (tap[None] < delay[:, None] + TAPS) & (delay < FOLD)[:, None]
    tl.store(parts + part * WIDTH + place[None], sums, mask=has_tap)


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Preactivation, packed filters, the runs, and with a gain parts of the squared norms."""
    x, weight, offsets = arguments.x, arguments.weight, arguments.offsets
    channels, width, taps = weight.shape
    saved = [(tuple(x.shape), x.dtype), ((channels // width, taps, width, width), x.dtype)]
    # Room for runs of one frame: of the shape of weight, on which their length depends, a compiler may know nothing.
    saved.append(((3, x.shape[0] + offsets.shape[0]), torch.int32))
    return saved if arguments.gain is None else [*saved, (weight_norm.parts_shape(weight), torch.float32)]


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    x, weight, bias, gain, offsets = contiguous(*arguments[:5])
    new = [x.new_empty(shape, dtype=dtype) for shape, dtype in saved_tensors(arguments)]
    preactivation, packed, table, *squares = new
    weight_norm.pack(weight, gain, squares[0] if squares else None, packed)
    _fill_run_table(table, offsets, x.shape[0], _fold(x, weight))
    out = torch.empty_like(x)
    _launch_convolve(x, packed, bias, x, offsets, table, out, preactivation if save else None)
    return (out,), new if save else []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    grad, x, weight, bias, gain, offsets = contiguous(*gradients, *arguments[:5])
    preactivation, packed, table, *squares = saved
    z_grad, bias_parts = _activation_backward(grad, preactivation, offsets)
    x_grad = weight_grad = bias_grad = gain_grad = None
    if wanted[0]:
        x_grad = torch.empty_like(x)
        _launch_convolve(z_grad, packed, None, grad, offsets, table, x_grad, None)
    if any(wanted[1:]):
        filters_grad = _filters_backward(x, z_grad, offsets, table, packed)
        weight_grad, gain_grad = weight_norm.pack_backward(filters_grad, weight, gain, squares[0] if squares else None)
        bias_grad = bias_parts.sum(0).to(bias.dtype)
    return x_grad, weight_grad, bias_grad, gain_grad


def _fold(x: Tensor, weight: Tensor) -> int:
    """Frames of a run in the forward and in the gradient of ``x``."""
    _, width, taps = weight.shape
    return _tile_columns(architecture(x), width, taps, x.element_size())[1]


def _run_count(rows: int, offsets: Tensor, fold: int) -> int:
    """Runs that are enough for any offsets: every sequence may leave a part of one unused, and so may the dead rows."""
    return rows if fold == 1 else rows // fold + offsets.shape[0]


def _fill_run_table(table: Tensor, offsets: Tensor, rows: int, fold: int) -> None:
    """Write the runs of ``fold`` frames to ``table``, ``[3, room]`` int32; `_run_count` of them are read. See `_runs`."""
    sequences, runs = offsets.shape[0] - 1, table.shape[1]
    arguments = {"offsets": offsets, "table": table, "rows": rows, "sequences": sequences, "runs": runs, "FOLD": fold}
    block = 1024 if architecture(offsets) == INTERPRETER else 128
    launch(_runs, lambda a: (cdiv(runs, a["BLOCK"]),), arguments, [Blocks({"BLOCK": block})])


def _launch_convolve(
    x: Tensor,
    filters: Tensor,  # [groups, taps, width, width]
    bias: Optional[Tensor],  # None: the gradient of x is wanted, and x is that of the preactivation
    residual: Tensor,
    offsets: Tensor,
    table: Tensor,  # [3, room]
    out: Tensor,
    preactivation: Optional[Tensor],
) -> None:
    groups, taps, width, _ = filters.shape
    columns, fold = _tile_columns(architecture(x), width, taps, x.element_size())
    runs, backward = _run_count(x.shape[0], offsets, fold), bias is None
    arguments = {
        "x": x, "filters": filters, "bias": bias, "residual": residual, "table": table, "out": out,
        "preactivation": preactivation, "runs": runs, "room": table.shape[1], "CHANNELS": x.shape[1], "WIDTH": width,
        "TAPS": taps, "BEFORE": taps - 1 - taps // 2 if backward else taps // 2, "FOLD": fold, "BACKWARD": backward,
        "PRECISION": _precision(x),
    }  # fmt: skip
    blocks = groups * cdiv(fold * width, columns)
    launch(
        _convolve,
        lambda a: (cdiv(runs, a["BLOCK_RUNS"]), blocks),
        arguments,
        _convolve_blocks(architecture(x), columns, x.element_size(), _precision(x)),
    )


def _activation_backward(grad: Tensor, preactivation: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the preactivation ``[rows, channels]``, and parts of that of the bias ``[PARTS, channels]`` float32."""
    rows, channels = grad.shape
    z_grad, parts = torch.empty_like(grad), grad.new_empty(PARTS, channels, dtype=torch.float32)
    arguments = {
        "grad": grad, "preactivation": preactivation, "offsets": offsets, "z_grad": z_grad, "parts": parts, "rows": rows,
        "sequences": offsets.shape[0] - 1, "CHANNELS": channels, "PARTS": PARTS,
    }  # fmt: skip
    blocks = Blocks({"BLOCK_ROWS": 16, "BLOCK_CHANNELS": 16 if architecture(grad) == INTERPRETER else 128})
    launch(_activation_gradient, lambda a: (PARTS, cdiv(channels, a["BLOCK_CHANNELS"])), arguments, [blocks])
    return z_grad, parts


def _filters_backward(x: Tensor, z_grad: Tensor, offsets: Tensor, table: Tensor, packed: Tensor) -> Tensor:
    """The filters' gradient, ``[channels (out), taps, channels / groups (in)]`` float32; ``table`` is of the forward's runs.

    In float32, on sm_80 and sm_86, and without `Switches.folded_filters` a run is one frame here.
    """
    groups, taps, width, _ = packed.shape
    (rows, channels), arch, itemsize = x.shape, architecture(x), x.element_size()
    columns, fold = _tile_columns(arch, width, taps, itemsize)
    if not switches.folded_filters or arch in (80, 86) or itemsize == 4:
        columns, fold = 64 if width <= 64 or itemsize == 4 else 128, 1
        table = table.new_empty(3, rows)
        _fill_run_table(table, offsets, rows, fold)
    runs = _run_count(rows, offsets, fold)
    parts = x.new_empty(fold, channels, taps, width, dtype=torch.float32)
    arguments = {
        "x": x, "z_grad": z_grad, "table": table, "parts": parts, "runs": runs, "room": table.shape[1],
        "CHANNELS": channels, "WIDTH": width, "TAPS": taps, "BEFORE": taps // 2, "FOLD": fold, "PRECISION": _precision(x),
    }  # fmt: skip
    blocks, depth = groups * cdiv(fold * width, columns), (taps + fold - 1) * width
    launch(
        _filters_gradient,
        lambda a: (cdiv(depth, a["BLOCK_DEPTH"]), blocks),
        arguments,
        _filters_blocks(arch, columns, itemsize),
    )
    return parts[0] if fold == 1 else parts.sum(0)


def _precision(x: Tensor) -> str:
    """As PyTorch's own convolutions, which use TF32 unless told otherwise."""
    return "tf32" if x.dtype == torch.float32 and tf32.in_convolutions() else "ieee"


@functools.cache
def _tile_columns(arch: int, width: int, taps: int, itemsize: int) -> tuple[int, int]:
    """(columns of a tile, frames of a run): the pair with the least to compute and to bring to the tensor cores.

    A run of ``fold`` frames computes taps + fold - 1 taps of ``columns`` columns; values of x count as 64 columns more.
    """
    if arch == INTERPRETER:
        choices = (16, 32)
    else:
        choices = (64, 128) if arch == 86 or itemsize == 4 else (64, 128, 256)

    def cost(columns: int) -> float:
        fold = max(1, columns // width)
        return (taps + fold - 1) * (columns + 64) * math.ceil(fold * width / columns) / fold

    columns = min(choices, key=cost)
    return columns, max(1, columns // width)


@functools.cache
def _convolve_blocks(arch: int, columns: int, itemsize: int, precision: str) -> list[Blocks]:
    """Shared memory beyond the tiles is L1, which is to hold what a tile of runs sees of x: three stages rather than four."""

    def blocks(runs: int, depth: int, warps: int, stages: int) -> Blocks:
        sizes = {"BLOCK_RUNS": runs, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth}
        return Blocks(sizes, warps, stages)

    if arch == INTERPRETER:
        return [blocks(16, 32, 4, 1)]
    if itemsize == 4:
        # Multiply-adds of "ieee" leave no registers to load ahead; tensor cores do.
        return [blocks(64, 16, 8, 3)] if precision == "tf32" else [blocks(32, 16, 4, 1), blocks(64, 16, 8, 1)]
    if arch in (80, 86):
        return [blocks(128, 32, 8, 4), blocks(64, 32, 4, 4), blocks(128, 64, 8, 3)]
    return [blocks(128, 64, 8, 3), blocks(128, 64, 8, 4), blocks(64, 64, 4, 3), blocks(128, 32, 8, 4)]


@functools.cache
def _filters_blocks(arch: int, columns: int, itemsize: int) -> list[Blocks]:
    """Tensor cores take 64 columns at least, of which groups of 48 channels fill as many as they have, or 240 of 256."""

    def blocks(runs: int, depth: int, warps: int, stages: int) -> Blocks:
        sizes = {"BLOCK_RUNS": runs, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth}
        return Blocks(sizes, warps, stages)

    if arch == INTERPRETER:
        return [blocks(16, 32, 4, 1)]
    if itemsize == 4:
        return [blocks(16, 64, 8, 3), blocks(32, 64, 8, 3)]
    warps = 4 if columns == 64 else 8
    if arch in (80, 86):
        return [blocks(32, 128, warps, 4), blocks(64, 128, 8, 3)]
    if columns == 256:
        return [blocks(64, 128, 8, 4), blocks(64, 128, 8, 3), blocks(32, 128, 8, 4)]
    return [blocks(64, 256, 8, 3), blocks(32, 256, 8, 4), blocks(64, 128, warps, 4)]
