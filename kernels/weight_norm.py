"""Filters of a grouped convolution for the kernels: laid out for them, in their dtype, weight normalisation folded in.

W = gain * weight / norm, a gain and a norm for each tap, the norm over all output and input channels (Salimans and Kingma 2016,
eq. 2; PyTorch's ``weight_norm`` with ``dim=2``). The backward is their eq. 3 with the sums over channels in PARTS parts.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch, next_power_of_2

# Programs that share the sums over channels, whatever the GPU: their order decides the last bits.
PARTS = 64


@triton.jit
def _sum_parts(parts, taps, TAPS: tl.constexpr, PARTS: tl.constexpr):
    """The sums of some taps, from ``parts`` [PARTS, TAPS]."""
    part = tl.arange(0, PARTS)[:, None]
    return tl.sum(tl.load(parts + part * TAPS + taps[None], mask=taps[None] < TAPS, other=1.0), 0)


@triton.jit
def _squares(weight, parts, PAIRS: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
             BLOCK_TAPS: tl.constexpr):  # fmt: skip
    """Parts of the sum of squares of each tap; a pair is an output and an input channel."""
    taps = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    total = tl.zeros([BLOCK_PAIRS, BLOCK_TAPS], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_PAIRS, PAIRS, PARTS * BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)[:, None]
        mask = (pairs < PAIRS) & (taps[None] < TAPS)
        values = tl.load(weight + pairs * TAPS + taps[None], mask=mask, other=0.0).to(tl.float32)
        total += values * values
    tl.store(parts + tl.program_id(0) * TAPS + taps, tl.sum(total, 0), mask=taps < TAPS)


@triton.jit
def _pack(weight, gain, squares, packed, WIDTH: tl.constexpr, TAPS: tl.constexpr, PARTS: tl.constexpr,
          BLOCK_OUT: tl.constexpr, BLOCK_TAPS: tl.constexpr):  # fmt: skip
    """[groups * WIDTH (out), WIDTH (in), TAPS] to [groups, TAPS, WIDTH (in), WIDTH (out)], times gain / norm with a gain."""
    group, channel = tl.program_id(0) // WIDTH, tl.program_id(0) % WIDTH
    taps = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    scale = tl.full([BLOCK_TAPS], 1.0, tl.float32)
    if gain is not None:
        gains = tl.load(gain + taps, mask=taps < TAPS, other=0.0).to(tl.float32)
        scale = gains / tl.sqrt(_sum_parts(squares, taps, TAPS, PARTS))
    for first in range(0, WIDTH, BLOCK_OUT):
        out = first + tl.arange(0, BLOCK_OUT)[:, None]
        mask = (out < WIDTH) & (taps[None] < TAPS)
        source = weight + ((group * WIDTH + out) * WIDTH + channel) * TAPS + taps[None]
        target = packed + ((group * TAPS + taps[None]) * WIDTH + channel) * WIDTH + out
        tl.store(target, tl.load(source, mask=mask, other=0.0).to(tl.float32) * scale[None], mask=mask)


@triton.jit
def _products(weight, filters_grad, parts, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr,
              PARTS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TAPS: tl.constexpr):  # fmt: skip
    """Parts of the sum over channels of weight * filters_grad, for each tap."""
    taps = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)[:, None]
    total = tl.zeros([BLOCK_TAPS, BLOCK_IN], tl.float32)
    for out in range(tl.program_id(0), CHANNELS, PARTS):
        for first in range(0, WIDTH, BLOCK_IN):
            channels = first + tl.arange(0, BLOCK_IN)[None]
            mask = (channels < WIDTH) & (taps < TAPS)
            values = tl.load(weight + (out * WIDTH + channels) * TAPS + taps, mask=mask, other=0.0).to(tl.float32)
            total += values * tl.load(filters_grad + (out * TAPS + taps) * WIDTH + channels, mask=mask, other=0.0)
    taps = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    tl.store(parts + tl.program_id(0) * TAPS + taps, tl.sum(total, 1), mask=taps < TAPS)


@triton.jit
def _unpack_gradient(filters_grad, weight, gain, squares, products, weight_grad, gain_grad, WIDTH: tl.constexpr,
                     TAPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_IN: tl.constexpr,
                     BLOCK_TAPS: tl.constexpr):  # fmt: skip
    """[channels (out), TAPS, WIDTH (in)] to the gradient of weight, [channels (out), WIDTH (in), TAPS], and that of gain."""
    out = tl.program_id(0)
    taps = tl.program_id(1) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    scale = tl.full([BLOCK_TAPS], 1.0, tl.float32)
    along = tl.zeros([BLOCK_TAPS], tl.float32)
    if gain is not None:
        norm = tl.sqrt(_sum_parts(squares, taps, TAPS, PARTS))
        projection = _sum_parts(products, taps, TAPS, PARTS) / norm
        scale = tl.load(gain + taps, mask=taps < TAPS, other=0.0).to(tl.float32) / norm
        along = projection / norm
        if out == 0:
            tl.store(gain_grad + taps, projection, mask=taps < TAPS)
    for first in range(0, WIDTH, BLOCK_IN):
        channels = first + tl.arange(0, BLOCK_IN)[None]
        mask = (channels < WIDTH) & (taps[:, None] < TAPS)
        place = (out * WIDTH + channels) * TAPS + taps[:, None]
        grad = tl.load(filters_grad + (out * TAPS + taps[:, None]) * WIDTH + channels, mask=mask, other=0.0)
        if gain is not None:
            grad -= along[:, None] * tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(weight_grad + place, scale[:, None] * grad, mask=mask)


def parts_shape(weight: Tensor) -> tuple[int, int]:
    """Of the parts of a sum over channels, float32."""
    return PARTS, weight.shape[2]


def pack(
    weight: Tensor,  # [channels, channels / groups, taps]
    gain: Optional[Tensor],  # [1, 1, taps]
    squares: Optional[Tensor],  # [PARTS, taps] float32
    packed: Tensor,  # [groups, taps, channels / groups (in), channels / groups (out)]
) -> None:
    """Fill ``packed`` with the filters and ``squares``, which belongs to ``gain``, with parts of the squared norms."""
    channels, width, taps = weight.shape
    blocks = _blocks(weight)
    sizes = {"TAPS": taps, "PARTS": PARTS}
    if gain is not None:
        arguments = {"weight": weight, "parts": squares, "PAIRS": channels * width, **sizes}
        launch(_squares, lambda a: (PARTS, cdiv(taps, a["BLOCK_TAPS"])), arguments, _renamed(blocks, "PAIRS"))
    arguments = {"weight": weight, "gain": gain, "squares": squares, "packed": packed, "WIDTH": width, **sizes}
    launch(_pack, lambda a: (channels, cdiv(taps, a["BLOCK_TAPS"])), arguments, _renamed(blocks, "OUT"))


def pack_backward(
    filters_grad: Tensor,  # [channels (out), taps, channels / groups (in)] float32
    weight: Tensor,  # [channels, channels / groups, taps]
    gain: Optional[Tensor],  # [1, 1, taps]
    squares: Optional[Tensor],  # [PARTS, taps] float32
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of ``weight`` and ``gain``, in their dtypes."""
    channels, width, taps = weight.shape
    blocks = _renamed(_blocks(weight), "IN")
    sizes = {"WIDTH": width, "TAPS": taps, "PARTS": PARTS}
    weight_grad, gain_grad, products = torch.empty_like(weight), None, None
    if gain is not None:
        gain_grad, products = torch.empty_like(gain), weight.new_empty(parts_shape(weight), dtype=torch.float32)
        arguments = {"weight": weight, "filters_grad": filters_grad, "parts": products, "CHANNELS": channels, **sizes}
        launch(_products, lambda a: (PARTS, cdiv(taps, a["BLOCK_TAPS"])), arguments, blocks)
    arguments = {
        "filters_grad": filters_grad, "weight": weight, "gain": gain, "squares": squares, "products": products,
        "weight_grad": weight_grad, "gain_grad": gain_grad, **sizes,
    }  # fmt: skip
    launch(_unpack_gradient, lambda a: (channels, cdiv(taps, a["BLOCK_TAPS"])), arguments, blocks)
    return weight_grad, gain_grad


def _blocks(weight: Tensor) -> list[Blocks]:
    """Tiles of 32 taps, a sector of 128 bytes in float32, by up to 64 channels."""
    if architecture(weight) == INTERPRETER:
        return [Blocks({"BLOCK": 16, "BLOCK_TAPS": 16})]
    return [Blocks({"BLOCK": min(64, next_power_of_2(weight.shape[1])), "BLOCK_TAPS": 32}, warps=4)]


def _renamed(blocks: list[Blocks], name: str) -> list[Blocks]:
    """The same with BLOCK called after what it counts."""
    return [
        Blocks({f"BLOCK_{name}": each.sizes["BLOCK"], "BLOCK_TAPS": each.sizes["BLOCK_TAPS"]}, each.warps, each.stages)
        for each in blocks
    ]
