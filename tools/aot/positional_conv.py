"""Launches of ``positional_conv``: forward and backward, with weight normalisation as the model has it, and the forward alone."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import positional_conv as kernels
from hubert_fast.ops.positional_conv import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    x = torch.empty(size.rows, size.dim, dtype=dtype, device="meta")
    weight = torch.empty(size.dim, size.group_channels, size.taps, device="meta")
    bias = torch.empty(size.dim, device="meta")
    gain = torch.empty(1, 1, size.taps, device="meta")
    offsets = torch.empty(size.batch + 1, dtype=torch.int64, device="meta")
    arguments = Arguments(x, weight, bias, gain, offsets, size.dim // size.group_channels, size.frames)
    (out,), saved = kernels.forward(arguments, save=True)
    kernels.backward(arguments, saved, (out,), [True] * 4)
    kernels.forward(arguments, save=False)  # as in evaluation
