"""The exact GELU of Hendrycks and Gimpel 2016, x Phi(x) with Phi the normal distribution function, and its slope."""

from __future__ import annotations

import triton
import triton.language as tl

from hubert_fast.kernels import fast_math


@triton.jit
def _tail_and_bell(x):
    """Phi(-|x|) and exp(-x^2 / 2): one exponential for both.

    Their ratio is a polynomial in t = 1 / (1 + 0.308 |x|), the form of Abramowitz and Stegun 1964, 7.1.26, here fitted for the
    least relative error, so that the tail keeps its leading digits too: 4e-6 for |x| up to 13, where the exponential vanishes.
    """
    t = fast_math.reciprocal(1.0 + 0.308 * tl.abs(x))
    series = -0.07553189 * t + 0.1899083
    series = series * t + 0.00695856
    series = series * t + 0.13669429
    series = series * t + 0.11884269
    series = (series * t + 0.12312615) * t
    bell = fast_math.exp2(-0.7213475204444817 * x * x)
    return series * bell, bell


@triton.jit
def gelu(x, LOW_PRECISION: tl.constexpr):
    """``x`` is float32; with LOW_PRECISION the result is for rounding to 16 bits."""
    if LOW_PRECISION:
        tail, _ = _tail_and_bell(x)
        result = tl.maximum(x, 0.0) - tl.abs(x) * tail
    else:
        result = 0.5 * x * (1.0 + tl.math.erf(0.7071067811865476 * x))
    return result


@triton.jit
def gelu_slope(x, LOW_PRECISION: tl.constexpr):
    """d gelu(x) / dx = Phi(x) + x phi(x), with phi the normal density."""
    if LOW_PRECISION:
        tail, bell = _tail_and_bell(x)
        below = tl.where(x < 0.0, tail, 1.0 - tail)
    else:
        bell = fast_math.exp2(-0.7213475204444817 * x * x)
        below = 0.5 + 0.5 * tl.math.erf(0.7071067811865476 * x)
    return below + 0.3989422804014327 * x * bell
