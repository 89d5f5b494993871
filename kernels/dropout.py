"""Dropout masks from a counter-based generator: a function of (seed, row, column), so the backward asks again, in any order.

A row and a column each get 32 random bits from Philox (Salmon et al. 2011); the bits of an element are a hash of the two.
One Philox round trip an element would cost more than the memory traffic it decorates: 25 integer instructions against 6.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEVELS = 1 << 32


def threshold(p: float) -> int:
    """What `keep` compares with: ``p`` to within 2^-33, shifted into the range of int32."""
    return min(round(p * _LEVELS), _LEVELS - 1) - (_LEVELS >> 1)


def scale(p: float) -> float:
    """What kept values are multiplied by, so that the expectation is unchanged."""
    return _LEVELS / ((_LEVELS >> 1) - threshold(p))


@triton.jit
def row_bits(seed, rows):
    """Random bits of each row: uint32, in the shape of ``rows`` (int32). ``seed`` is a scalar int64."""
    return tl.randint(seed, rows).to(tl.uint32, bitcast=True)


@triton.jit
def column_bits(seed, columns):
    """Random bits of each column, independent of those of the rows."""
    return tl.randint(seed ^ 0x5851F42D4C957F2D, columns).to(tl.uint32, bitcast=True)


@triton.jit
def keep(rows, columns, threshold):
    """Which elements are kept: ``rows`` and ``columns`` are bits that broadcast with each other."""
    bits = (rows ^ columns) * 0x9E3779B1
    bits = (bits ^ (bits >> 15)) * 0x85EBCA77
    return bits.to(tl.int32, bitcast=True) >= threshold
