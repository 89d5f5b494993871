"""The convolutional positional embedding, a sequence at a time, as the formula says.

Source: wav2vec 2.0 (Baevski et al. 2020), section 2: a grouped convolution over time and a GELU, added to its input. Weight
normalisation: Salimans and Kingma 2016, eq. 2, with a gain for each tap.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast import cpu


def positional_conv(
    x: Tensor,  # [rows, channels]
    weight: Tensor,  # [channels, channels / groups, taps]
    bias: Tensor,  # [channels]
    offsets: Tensor,  # [sequences + 1] int64: sequence i is rows offsets[i] : offsets[i + 1]
    *,
    groups: int,
    gain: Optional[Tensor] = None,  # [1, 1, taps]
) -> Tensor:  # [rows, channels], 0 beyond offsets[-1]
    if gain is not None:
        weight = gain * weight / torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
    dtype = cpu.convolution_dtype(x.device, x.dtype, weight.shape[1])
    # Rounded to x's dtype first, whatever the convolution's: this is its formula.
    weight, bias = (each.to(x.dtype).to(dtype) for each in (weight, bias))
    bounds = offsets.tolist()
    outputs = []
    for start, stop in zip(bounds, bounds[1:]):
        if start < stop:
            frames = x[start:stop]
            z = F.conv1d(frames.T[None].to(dtype), weight, bias, padding=weight.shape[2] // 2, groups=groups)[0].T
            outputs.append(
                F.gelu(z[: stop - start].to(x.dtype)) + frames
            )  # an even kernel gives one frame more than it is given
    return torch.cat([*outputs, torch.zeros_like(x[bounds[-1] :])])
