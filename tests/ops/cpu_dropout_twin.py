"""csrc/cpu/masks.h again in PyTorch: the same mask from the same seed, so that the reference can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor

from hubert_fast.reference import masked_attention
from hubert_fast.reference.dropout import keep_scale, keep_threshold

_32 = 0xFFFFFFFF


def keep(seed: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Bool ``[..., columns]`` for the numbers of ``rows``, ``[...]`` int64; True is kept."""
    key = _mixed(rows * _signed(0x9E3779B97F4A7C15) + seed)[..., None]
    column = torch.arange(columns)
    bits = ((column // 32 * 16 + column % 16) * 0x9E3779B1 + (key & _32)) & _32
    bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD & _32) ^ _shifted(key, 32)
    bits = (bits ^ (bits >> 15)) * 0x735A2D97 & _32
    bits = bits ^ (bits >> 15)
    return torch.where(column % 32 < 16, bits & 0xFFFF, bits >> 16) >= keep_threshold(p)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def attention_dropping(kept: Callable[[int, range, int, int, float], Tensor], scale: Callable[[float], float]) -> Any:
    """The reference of `masked_attention` with the mask ``kept(seed, rows, heads, keys, p)``, ``[heads, rows, keys]`` bool."""

    def attention(
        qkv: Tensor, offsets: Tensor, key_lengths: Optional[Tensor], *, dropout_p: float, seed: Optional[Tensor]
    ) -> Tensor:
        outputs = []
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            query, key, value = qkv[start:stop].permute(1, 2, 0, 3)
            keys = int(key_lengths[i]) if key_lengths is not None and key_lengths[i] > 0 else stop - start
            weights = (query @ key[:, :keys].transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
            if dropout_p:
                mask = kept(int(seed), range(start, stop), qkv.shape[2], keys, dropout_p).to(qkv.device)
                weights = weights * mask * scale(dropout_p)
            outputs.append((weights @ value[:, :keys]).transpose(0, 1))
        return torch.cat([*outputs, torch.zeros_like(qkv[int(offsets[-1]) :, 0])])

    return attention


def _kept(seed: int, rows: range, heads: int, keys: int, p: float) -> Tensor:
    return keep(seed, (torch.arange(heads)[:, None] << 32) + torch.tensor(rows, dtype=torch.int64), keys, p)


@contextmanager
def in_references() -> Iterator[None]:
    """Inside, the reference of attention drops what backend "cpu" drops."""
    with mock.patch.object(masked_attention, "masked_attention", attention_dropping(_kept, keep_scale)):
        yield
