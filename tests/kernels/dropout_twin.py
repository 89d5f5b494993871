"""kernels/dropout.py again in PyTorch: the same bits from the same seed, so that references can use a kernel's mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Optional
from unittest import mock

import torch
from torch import Tensor

from hubert_fast.kernels import dropout
from hubert_fast.ops import bias_dropout_residual, bias_gelu_dropout, mask_fill, residual_layer_norm
from hubert_fast.reference import masked_attention
from hubert_fast.reference.dropout import Kept
from tests.kernels.device import DEVICE
from tests.ops.cpu_dropout_twin import attention_dropping

_32 = 0xFFFFFFFF


def keep(seed: int, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Bool in the broadcast shape of ``rows`` and ``columns`` (int64, each in [0, 2^32)); True is kept."""
    bits = ((_bits(seed, rows) ^ _bits(seed ^ 0x5851F42D4C957F2D, columns)) * 0x9E3779B1) & _32
    bits = ((bits ^ (bits >> 15)) * 0x85EBCA77) & _32
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits) >= dropout.threshold(p)


def _bits(seed: int, counter: Tensor) -> Tensor:
    high = (seed >> 32) + (seed & _32) * 0x9E3779B1
    bits = (counter.long() ^ seed) & _32
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _32
    bits = (((bits ^ (bits >> 15)) + (high & _32)) & _32) * 0x846CA68B & _32
    return bits ^ (bits >> 16)


def kept_values(seed: Optional[Tensor], rows: int, channels: int, p: float) -> Optional[Kept]:
    """The mask and the scale of a kernel's dropout of [rows, channels]; None where ``p`` is 0."""
    if p == 0.0:
        return None
    kept = keep(int(seed), torch.arange(rows)[:, None], torch.arange(channels), p)
    return Kept(kept.to(DEVICE), dropout.scale(p))


def _kept_weights(seed: int, rows: range, heads: int, keys: int, p: float) -> Tensor:
    """A row of the mask is a packed row and a head, a column a key."""
    numbers = torch.tensor(rows, dtype=torch.int64) * heads + torch.arange(heads)[:, None]
    return keep(seed, numbers[..., None], torch.arange(keys), p)


@contextmanager
def in_references() -> Iterator[None]:
    """Inside, references drop what the kernels drop."""
    attention = attention_dropping(_kept_weights, dropout.scale)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(masked_attention, "masked_attention", attention))
        for module in (bias_dropout_residual, bias_gelu_dropout, mask_fill, residual_layer_norm):
            patches.enter_context(mock.patch.object(module, "kept_values", kept_values))
        yield
