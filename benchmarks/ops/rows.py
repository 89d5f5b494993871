"""Random inputs of passes over rows of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import randn


def rows(generator: torch.Generator, count: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Activations ``[count, channels]`` that want a gradient."""
    return randn(generator, count, channels, dtype=dtype).requires_grad_()


def parameter(generator: torch.Generator, channels: int) -> Tensor:
    """A parameter ``[channels]``: float32, as under autocast."""
    return randn(generator, channels).requires_grad_()


def stream_dtype(dtype: torch.dtype, device: str, *, pre_norm: bool) -> torch.dtype:
    """The residual stream's dtype under autocast: post-norm, it is made of LayerNorm's results, float32 on CUDA."""
    return dtype if pre_norm or torch.device(device).type != "cuda" else torch.float32


def seed_on(device: str) -> Tensor:
    """Of dropout's mask."""
    return torch.tensor(0, device=device)
