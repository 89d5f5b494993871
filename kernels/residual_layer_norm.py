"""A residual sum and its LayerNorm in one pass over whole rows, and all gradients in another that draws the masks again.

Statistics are two-pass in registers: the mean, then the variance of what is centred. What the backward needs of an update is the
sum, in its dtype, and each row's mean and reciprocal deviation: a pre-norm transformer wants the sum anyway, and in post-norm
order writing and reading it moves the bytes that reading residual and update again would.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels import dropout
from hubert_fast.kernels.column_tiles import (
    contiguous,
    load_columns,
    new_parts,
    parts_of,
    store_part,
    sum_parts,
    within,
)
from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch, next_power_of_2

if TYPE_CHECKING:
    from hubert_fast.ops.residual_layer_norm import Arguments

# A program needs whole rows, so that programs are not also dealt over columns: twice as many share the rows.
_PARTS = 256


@triton.jit
def _second_key(seed):
    """The seed of the normed sum's mask (reference/dropout.py, SECOND_MASK)."""
    return tl.load(seed) ^ 0x2545F4914F6CDD1D


@triton.jit
def _load_rows(matrix, position, column, inside, CHANNELS: tl.constexpr):
    """[ROWS, COLUMNS] float32: rows ``position`` (int64) of a [..., CHANNELS] matrix."""
    return tl.load(matrix + position[:, None] * CHANNELS + column[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(matrix, values, position, column, inside, CHANNELS: tl.constexpr):
    tl.store(matrix + position[:, None] * CHANNELS + column[None], values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _position(index, row, rows):
    """Of each row, int64."""
    position = row.to(tl.int64)
    if index is not None:
        position = tl.load(index + row, mask=row < rows, other=0)
    return position


@triton.jit
def _dropped(value, key, row, column_bits, threshold, scale):
    kept = dropout.keep(dropout.row_bits(key, row)[:, None], column_bits, threshold)
    return tl.where(kept, value * scale, 0.0)


@triton.jit(do_not_specialize=["rows", "seed"])
def _forward(residual, update, update_bias, index, weight, bias, seed, normed, copy, summed, mean, rstd, rows, eps,
             update_threshold, update_scale, output_threshold, output_scale, CHANNELS: tl.constexpr,
             UPDATE_DROPOUT: tl.constexpr, OUTPUT_DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             TILES: tl.constexpr):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    gain, offset = load_columns(weight, column, CHANNELS), load_columns(bias, column, CHANNELS)
    if update_bias is not None:
        shift = load_columns(update_bias, column, CHANNELS)
    if UPDATE_DROPOUT:
        update_key = tl.load(seed)
        update_bits = dropout.column_bits(update_key, column)[None]
    if OUTPUT_DROPOUT:
        output_key = _second_key(seed)
        output_bits = dropout.column_bits(output_key, column)[None]
    for tile in range(TILES):
        row = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        own = row.to(tl.int64)
        x = _load_rows(residual, _position(index, row, rows), column, inside, CHANNELS)
        if update is not None:
            added = _load_rows(update, own, column, inside, CHANNELS)
            if update_bias is not None:
                added += shift
            if UPDATE_DROPOUT:
                added = _dropped(added, update_key, row, update_bits, update_threshold, update_scale)
            x += added
            if summed is not None:
                _store_rows(summed, x, own, column, inside, CHANNELS)
        means = tl.sum(x, 1) / CHANNELS
        # Statistics are written as soon as they are known: kept until the end they cost registers that ptxas spills.
        tl.store(mean + row, means, mask=row < rows)
        centred = tl.where((column < CHANNELS)[None], x - means[:, None], 0.0)
        rstds = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
        tl.store(rstd + row, rstds, mask=row < rows)
        value = centred * rstds[:, None] * gain + offset
        if OUTPUT_DROPOUT:
            value = _dropped(value, output_key, row, output_bits, output_threshold, output_scale)
        _store_rows(normed, value, own, column, inside, CHANNELS)
        if copy is not None:
            _store_rows(copy, value, own, column, inside, CHANNELS)


@triton.jit(do_not_specialize=["rows", "seed"])
def _backward(grad, copy_grad, sum_grad, x, x_index, index, mean, rstd, weight, seed, residual_grad, update_grad, parts,
              rows, update_threshold, update_scale, output_threshold, output_scale, CHANNELS: tl.constexpr,
              UPDATE_DROPOUT: tl.constexpr, OUTPUT_DROPOUT: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    gain = load_columns(weight, column, CHANNELS)
    weight_sums = tl.zeros([COLUMNS], tl.float32)
    bias_sums = tl.zeros([COLUMNS], tl.float32)
    update_sums = tl.zeros([COLUMNS], tl.float32)
    if UPDATE_DROPOUT:
        update_key = tl.load(seed)
        update_bits = dropout.column_bits(update_key, column)[None]
    if OUTPUT_DROPOUT:
        output_key = _second_key(seed)
        output_bits = dropout.column_bits(output_key, column)[None]
    for start in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        inside = within(row, rows, column, CHANNELS, COLUMNS)
        own = row.to(tl.int64)
        upstream = _load_rows(grad, own, column, inside, CHANNELS)
        if copy_grad is not None:
            upstream += _load_rows(copy_grad, own, column, inside, CHANNELS)
        value = _load_rows(x, _position(x_index, row, rows), column, inside, CHANNELS)
        means = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        rstds = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if OUTPUT_DROPOUT:
            upstream = _dropped(upstream, output_key, row, output_bits, output_threshold, output_scale)
        normal = (value - means) * rstds  # what lies outside meets an upstream of 0 wherever it is summed
        weight_sums += tl.sum(upstream * normal, 0)
        bias_sums += tl.sum(upstream, 0)
        upstream = upstream * gain
        along = tl.sum(upstream * normal, 1) / CHANNELS
        passed = (upstream - (tl.sum(upstream, 1) / CHANNELS)[:, None] - normal * along[:, None]) * rstds
        if sum_grad is not None:
            passed += _load_rows(sum_grad, own, column, inside, CHANNELS)
        _store_rows(residual_grad, passed, _position(index, row, rows), column, inside, CHANNELS)
        if UPDATE_DROPOUT:
            passed = _dropped(passed, update_key, row, update_bits, update_threshold, update_scale)
        if update_grad is not None:
            _store_rows(update_grad, passed, own, column, inside, CHANNELS)
        if VECTORS > 2:
            update_sums += tl.sum(passed, 0)
    store_part(parts, 0, weight_sums, column, CHANNELS, VECTORS)
    store_part(parts, 1, bias_sums, column, CHANNELS, VECTORS)
    if VECTORS > 2:
        store_part(parts, 2, update_sums, column, CHANNELS, VECTORS)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor, Optional[Tensor], Optional[Tensor]], list[Tensor]]:
    residual, weight, bias, update, update_bias, index = contiguous(*arguments[:6])
    rows, channels = arguments.shape
    normed = residual.new_empty(rows, channels, dtype=arguments.dtype)
    copy = None if arguments.narrow is None else torch.empty_like(normed, dtype=arguments.narrow)
    summed = torch.empty_like(normed) if update is not None and (save or arguments.with_sum) else None
    mean, rstd = (residual.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tensors = {
        "residual": residual, "update": update, "update_bias": update_bias, "index": index, "weight": weight, "bias": bias,
        "normed": normed, "copy": copy, "summed": summed, "mean": mean, "rstd": rstd,
    }  # fmt: skip
    blocks = _blocks(architecture(residual), channels)
    if architecture(residual) == 86 and channels == 512:
        blocks = blocks[1:]  # four rows at a time spill 8 bytes a thread with Triton 3.6
    launch(
        _forward,
        lambda sizes: (cdiv(rows, sizes["ROWS"] * sizes["TILES"]),),
        {**tensors, "rows": rows, "eps": arguments.eps, "CHANNELS": channels, **_dropout_settings(arguments)},
        blocks,
    )
    return (normed, copy, summed), [mean, rstd] if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Each row's mean and reciprocal deviation."""
    return [(arguments.shape[:1], torch.float32)] * 2


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    residual, _, bias, update, update_bias, _ = arguments[:6]
    summed, mean, rstd = saved
    upstream, (weight, index) = arguments.upstream(gradients), contiguous(arguments.weight, arguments.index)
    grad, copy_grad, sum_grad = contiguous(*upstream)
    rows, channels = arguments.shape
    if grad is None:
        grad = residual.new_zeros(rows, channels, dtype=arguments.dtype)
    fresh = torch.empty_like if index is None else torch.zeros_like
    residual_grad = fresh(residual, memory_format=torch.contiguous_format)
    x, x_index, update_grad = summed, None, None
    if update is None:
        x, x_index = residual.contiguous(), index
    elif not arguments.one_gradient:
        update_grad = torch.empty_like(summed, dtype=update.dtype)
    vectors = [weight, bias] if update_bias is None else [weight, bias, update_bias]
    parts = new_parts(grad, rows, len(vectors), _PARTS)
    blocks = _blocks(architecture(grad), channels)
    # Dropout behind the norm alone, where a post-norm stream begins: with four rows at a time ptxas spills 8 bytes a thread.
    if arguments.output_dropout_p > 0.0 and update is None and len(blocks) > 1:
        blocks = blocks[1:]
    tensors = {
        "grad": grad, "copy_grad": copy_grad, "sum_grad": sum_grad, "x": x, "x_index": x_index, "index": index,
        "mean": mean, "rstd": rstd, "weight": weight, "residual_grad": residual_grad, "update_grad": update_grad,
        "parts": parts,
    }  # fmt: skip
    launch(
        _backward,
        lambda _: (parts_of(rows, _PARTS),),
        {**tensors, "rows": rows, "CHANNELS": channels, "VECTORS": len(vectors), **_dropout_settings(arguments)},
        blocks,
    )
    weight_grad, bias_grad, update_bias_grad = [*sum_parts(parts, vectors), None][:3]
    return (
        residual_grad,
        weight_grad,
        bias_grad,
        residual_grad if arguments.one_gradient else update_grad,
        update_bias_grad,
    )


def _dropout_settings(arguments: Arguments) -> dict[str, Any]:
    update_p = 0.0 if arguments.update is None else arguments.update_dropout_p
    output_p = arguments.output_dropout_p
    return {
        "seed": arguments.seed,
        "update_threshold": dropout.threshold(update_p),
        "update_scale": dropout.scale(update_p),
        "UPDATE_DROPOUT": update_p > 0.0,
        "output_threshold": dropout.threshold(output_p),
        "output_scale": dropout.scale(output_p),
        "OUTPUT_DROPOUT": output_p > 0.0,
    }


@functools.cache
def _blocks(arch: int, channels: int) -> list[Blocks]:
    """A row is as wide as a program, a warp 256 channels of it: sums over rows then stay within a thread."""
    columns = next_power_of_2(channels)
    if arch == INTERPRETER:
        return [Blocks({"ROWS": 16, "COLUMNS": columns, "TILES": 2}, warps=1)]
    warps, most = min(16, max(1, columns // 256)), max(1, 8192 // columns)
    return [
        Blocks({"ROWS": min(rows, most), "COLUMNS": columns, "TILES": tiles}, warps=warps)
        for rows, tiles in ((4, 2), (2, 4), (4, 4), (1, 8))
    ]
