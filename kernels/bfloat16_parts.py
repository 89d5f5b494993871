"""Float32 products on tensor cores: each factor is a sum of bfloat16 parts, and parts are multiplied with parts.

A float32 number is three bfloat16 numbers (24 bits are three times 8), a float16 number two, a bfloat16 number one: exactly, but
for what lies below the smallest bfloat16. Of the products of part i with part j those with i + j < order are added. What order 3
leaves out is 2^-25 of a product, less than float32's own rounding; order 2 leaves out 2^-16, a hundredth of the rounding of a
16-bit result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# How many parts the numbers of a dtype have.
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def order_for(result: torch.dtype) -> int:
    """The order with which a result of dtype ``result`` is as precise as if it were computed in float32 and rounded."""
    return 3 if result == torch.float32 else 2


@triton.jit
def split(x):
    """The three parts of ``x``, largest first; those beyond `PARTS` of its dtype are zeros."""
    if x.dtype == tl.bfloat16:
        high = x
    else:
        high = x.to(tl.float32).to(tl.bfloat16)
    rest = x.to(tl.float32) - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _add_part(total, high, middle, low, b, PART: tl.constexpr, A_PARTS: tl.constexpr, ORDER: tl.constexpr):
    """``total + a @ b``, where ``b`` is part number ``PART`` of the right factor and ``a`` comes in parts."""
    total = tl.dot(high, b, total)
    if A_PARTS > 1 and PART + 1 < ORDER:
        total = tl.dot(middle, b, total)
    if A_PARTS > 2 and PART + 2 < ORDER:
        total = tl.dot(low, b, total)
    return total


@triton.jit
def add_product(total, a, b, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr, ORDER: tl.constexpr):
    """``total + a @ b`` for two blocks of numbers."""
    high, middle, low = split(a)
    b_high, b_middle, b_low = split(b)
    total = _add_part(total, high, middle, low, b_high, 0, A_PARTS, ORDER)
    if B_PARTS > 1 and ORDER > 1:
        total = _add_part(total, high, middle, low, b_middle, 1, A_PARTS, ORDER)
    if B_PARTS > 2 and ORDER > 2:
        total = _add_part(total, high, middle, low, b_low, 2, A_PARTS, ORDER)
    return total


@triton.jit
def add_product_with_parts(total, a, pointers, part_stride, A_PARTS: tl.constexpr, ORDER: tl.constexpr):
    """``total + a @ b``, where the parts of ``b`` lie in memory, ``part_stride`` elements apart, the first at ``pointers``."""
    high, middle, low = split(a)
    for PART in tl.static_range(ORDER):
        b = tl.load(pointers + PART * part_stride)
        total = _add_part(total, high, middle, low, b, PART, A_PARTS, ORDER)
    return total
