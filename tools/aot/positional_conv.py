"""Launches of ``positional_conv``: forward and backward, with weight normalisation as the model has it, and the forward alone."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import positional_conv as kernels


def launches(size: Size, dtype: torch.dtype) -> None:
    x = torch.empty(size.rows, size.dim, dtype=dtype, device="meta")
    weight = torch.empty(size.dim, size.group_channels, size.taps, device="meta")
    bias = torch.empty(size.dim, device="meta")
    gain = torch.empty(1, 1, size.taps, device="meta")
    offsets = torch.empty(size.batch + 1, dtype=torch.int64, device="meta")
    inputs = x, weight, bias, gain, offsets
    out, saved = kernels.positional_conv(*inputs, True)
    kernels.positional_conv_backward(out, *inputs, saved, x_wanted=True, parameters_wanted=True)
    kernels.positional_conv(*inputs, False)  # as in evaluation
