"""What the device does at best, measured in the same run as what stands beside it: a large copy and a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from hubert_fast import cpu

from .clock import device_seconds
from .report import Limits

_UNTIMED = 2  # calls that fill caches, find pages and choose kernels
_GROUPS = 3  # of calls, the best of which counts: a limit is what the device does undisturbed


# (bytes of the copy; rows, summed over, columns of the product; calls of a group)
_CPU = (256 << 20, (2048, 3072, 1536), 3)  # as deep as the feed-forward's second product; fractions of a second
_CUDA = (1 << 30, (8192, 8192, 8192), 10)


def measure_limits(device: torch.device | str, dtype: torch.dtype) -> Limits:
    """Bandwidth of a large copy (bytes read and written) and rate of a large product of random numbers in ``dtype``.

    Both as the process is set up now: on the CPU with torch's threads, on CUDA with TF32 as allowed now. The best of several
    medians. Where a CPU has no product in 16 bits, it is one in float32: PyTorch's own loops run at a hundredth of its rate.
    """
    copied, (rows, inner, columns), repeats = _CUDA if torch.device(device).type == "cuda" else _CPU
    source, target = torch.zeros(2, copied, dtype=torch.uint8, device=device)
    bytes_per_second = 2 * copied / _sustained(lambda: target.copy_(source), device, repeats)
    dtype = cpu.product_dtype(torch.device(device), dtype)
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    products: list[Callable[[], Any]] = [lambda: left @ right]
    if torch.device(device).type == "cpu":
        products.append(lambda: cpu.product(left, right.T, None))  # by oneDNN, where MKL may be half as fast
    taken = min(_sustained(product, device, repeats) for product in products)
    return Limits(bytes_per_second, 2.0 * rows * inner * columns / taken)


def _sustained(step: Callable[[], Any], device: torch.device | str, repeats: int) -> float:
    """Seconds of ``step``."""
    timed = [device_seconds(step, device) for _ in range(_UNTIMED + _GROUPS * repeats)][_UNTIMED:]
    return min(statistics.median(timed[first : first + repeats]) for first in range(0, len(timed), repeats))
