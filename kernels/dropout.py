"""Dropout masks from a counter-based generator: a function of (seed, row, column), so the backward asks again, in any order.

A row and a column each get 32 bits, a hash of their number and the seed; the bits of an element are a hash of the two. Philox
(Salmon et al. 2011) would take 25 integer instructions an element and 100 a row, more than the memory traffic takes that
they decorate; this takes 6 and 12. The multipliers are known to mix well (Wellons 2018, "Prospecting for Hash Functions");
tests/kernels/test_dropout.py says what was tested of the result.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import triton
import triton.language as tl
from torch import Tensor

_LEVELS = 1 << 32


@functools.cache
def threshold(p: float) -> int:
    """What `keep` compares with: ``p`` to within 2^-33, shifted into the range of int32."""
    return min(round(p * _LEVELS), _LEVELS - 1) - (_LEVELS >> 1)


@functools.cache
def scale(p: float) -> float:
    """What kept values are multiplied by, so that the expectation is unchanged."""
    return _LEVELS / ((_LEVELS >> 1) - threshold(p))


def settings(p: float, seed: Optional[Tensor]) -> dict[str, Any]:
    """What a kernel with one mask is given, by name."""
    return {"seed": seed, "threshold": threshold(p), "scale": scale(p), "DROPOUT": p > 0.0}


@triton.jit
def row_bits(seed, rows):
    """Random bits of each row: uint32, in the shape of ``rows`` (int32). ``seed`` is a scalar int64."""
    low = seed.to(tl.uint32)
    # The low half counts twice: else seeds that differ in it alone would give the same masks with rows exchanged.
    high = (seed >> 32).to(tl.uint32) + low * 0x9E3779B1
    bits = rows.to(tl.uint32) ^ low
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = ((bits ^ (bits >> 15)) + high) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def column_bits(seed, columns):
    """Random bits of each column, independent of those of the rows."""
    return row_bits(seed ^ 0x5851F42D4C957F2D, columns)


@triton.jit
def keep(rows, columns, threshold):
    """Which elements are kept: ``rows`` and ``columns`` are bits that broadcast with each other."""
    bits = (rows ^ columns) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) * 0x85EBCA77
    return bits.to(tl.int32, bitcast=True) >= threshold
