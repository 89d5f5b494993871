"""The convolutional front end, layer by layer, as HuBERT defines it: convolution, normalisation, GELU.

Source: wav2vec 2.0 (Baevski et al. 2020), section 2, "feature encoder"; HuBERT (Hsu et al. 2021), section III-A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


def output_length(samples: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Frames that ``samples`` samples give; 0 where a layer has fewer inputs than taps."""
    for kernel, stride in zip(kernels, strides):
        samples = max((samples - kernel) // stride + 1, 0)
    return samples


def conv_frontend(
    waveforms: Tensor,  # [batch, samples]
    weights: Sequence[Tensor],  # each [out_channels, in_channels, kernel]
    biases: Sequence[Tensor],  # each [out_channels], or none at all
    norm_weights: Sequence[Tensor],  # one (group norm) or one a layer (layer norm), each [out_channels]
    norm_biases: Sequence[Tensor],
    *,
    strides: Sequence[int],
    norm: str,  # "group_norm" or "layer_norm"
    valid_samples: Optional[Tensor] = None,  # [batch] int64: take the group-norm statistics over these samples only
) -> Tensor:  # [batch, frames, channels]
    x = waveforms.unsqueeze(1)
    for i, (weight, stride) in enumerate(zip(weights, strides)):
        x = F.conv1d(x, weight, biases[i] if biases else None, stride=stride)
        if norm == "layer_norm":
            x = F.layer_norm(x.transpose(1, 2), weight.shape[:1], norm_weights[i], norm_biases[i], NORM_EPS)
            x = x.transpose(1, 2)
        elif i == 0:
            x = channel_norm(x, norm_weights[0], norm_biases[0], _valid_frames(valid_samples, weight, stride))
        x = F.gelu(x)
    return x.transpose(1, 2)


def _valid_frames(valid_samples: Optional[Tensor], weight: Tensor, stride: int) -> Optional[Tensor]:
    if valid_samples is None:
        return None
    valid_samples = valid_samples.to(weight.device)
    return torch.div(valid_samples - weight.shape[2], stride, rounding_mode="floor").add(1).clamp(min=0)


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, valid_frames: Optional[Tensor]) -> Tensor:
    """GroupNorm with one group a channel; with ``valid_frames`` the statistics leave the padding out."""
    if valid_frames is None:
        return F.group_norm(x, weight.shape[0], weight, bias, NORM_EPS)
    valid = (torch.arange(x.shape[2], device=x.device) < valid_frames[:, None])[:, None]  # [batch, 1, frames]
    count = valid.sum(2, keepdim=True).clamp(min=1)
    mean = x.where(valid, 0).sum(2, keepdim=True) / count
    variance = (x - mean).square().where(valid, 0).sum(2, keepdim=True) / count
    return (x - mean) * torch.rsqrt(variance + NORM_EPS) * weight[:, None] + bias[:, None]
