"""kernels/dropout.py again in PyTorch: the same bits from the same seed, so that references can use a kernel's mask."""

import torch
from torch import Tensor

from hubert_fast.kernels.dropout import threshold

_32 = 0xFFFFFFFF


def keep(seed: int, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Bool in the broadcast shape of ``rows`` and ``columns`` (int64, each in [0, 2^32)); True is kept."""
    bits = ((_bits(seed, rows) ^ _bits(seed ^ 0x5851F42D4C957F2D, columns)) * 0x9E3779B1) & _32
    bits = ((bits ^ (bits >> 15)) * 0x85EBCA77) & _32
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits) >= threshold(p)


def _bits(seed: int, counter: Tensor) -> Tensor:
    high = (seed >> 32) + (seed & _32) * 0x9E3779B1
    bits = (counter.long() ^ seed) & _32
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _32
    bits = (((bits ^ (bits >> 15)) + (high & _32)) & _32) * 0x846CA68B & _32
    return bits ^ (bits >> 16)
