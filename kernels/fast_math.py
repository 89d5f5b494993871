"""Approximations of the special function unit, without the handling of subnormal numbers that doubles their cost."""

from __future__ import annotations

import triton
import triton.language as tl

from hubert_fast.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def reciprocal(x):
    """1 / x of float32, to the last bit; 0 for |x| beyond 2^126."""
    if _INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def exp2(x):
    """2^x of float32, to 2 units in the last place; 0 for x below -126."""
    if _INTERPRETED:
        result = tl.exp2(x)
    else:
        result = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return result
