"""kernels/dropout.py again in PyTorch: the same bits from the same seed, so that references can use a kernel's mask."""

import torch
from torch import Tensor

from hubert_fast.kernels.dropout import threshold

_32 = 0xFFFFFFFF


def keep(seed: int, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Bool in the broadcast shape of ``rows`` and ``columns`` (int64, each in [0, 2^32)); True is kept."""
    row_bits, column_bits = _philox(seed, rows), _philox(seed ^ 0x5851F42D4C957F2D, columns)
    bits = ((row_bits ^ column_bits) * 0x9E3779B1) & _32
    bits = ((bits ^ (bits >> 15)) * 0x85EBCA77) & _32
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits) >= threshold(p)


def _philox(seed: int, counter: Tensor) -> Tensor:
    """The first word of Philox 4x32-10 (Salmon et al. 2011) at (counter, 0, 0, 0)."""
    seed &= (1 << 64) - 1
    key0, key1 = seed & _32, seed >> 32
    word0 = counter.long() & _32
    word1, word2, word3 = (torch.zeros_like(word0) for _ in range(3))
    for _ in range(10):
        high0, low0 = _multiply(word0, 0xD2511F53)
        high2, low2 = _multiply(word2, 0xCD9E8D57)
        word0, word1, word2, word3 = high2 ^ word1 ^ key0, low2, high0 ^ word3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _32, (key1 + 0xBB67AE85) & _32
    return word0


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 64-bit product, without leaving int64."""
    low_part, high_part = x * (factor & 0xFFFF), x * (factor >> 16)
    middle = high_part + (low_part >> 16)
    return (middle >> 16) & _32, ((middle << 16) | (low_part & 0xFFFF)) & _32
