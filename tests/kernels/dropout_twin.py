"""kernels/dropout.py again in PyTorch: the same bits from the same seed, so that references can use a kernel's mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Optional
from unittest import mock

import torch
from torch import Tensor

from hubert_fast.kernels import dropout
from hubert_fast.ops import bias_dropout_residual, bias_gelu_dropout, mask_fill, residual_layer_norm
from hubert_fast.reference import masked_attention
from tests.kernels.device import DEVICE

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


def kept_values(seed: Optional[Tensor], rows: int, channels: int, p: float) -> Optional[Tensor]:
    """The mask that a kernel's dropout of [rows, channels] keeps, bool; None where ``p`` is 0."""
    if p == 0.0:
        return None
    return keep(int(seed), torch.arange(rows)[:, None], torch.arange(channels), p).to(DEVICE)


def _masked_attention(
    qkv: Tensor, offsets: Tensor, key_lengths: Optional[Tensor], *, dropout_p: float, seed: Optional[Tensor]
) -> Tensor:
    """The reference with the kernels' mask: a row of it is a packed row and a head, a column a key."""
    heads, outputs = torch.arange(qkv.shape[2]), []
    for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
        query, key, value = qkv[start:stop].permute(1, 2, 0, 3)
        keys = int(key_lengths[i]) if key_lengths is not None and key_lengths[i] > 0 else stop - start
        weights = (query @ key[:, :keys].transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        if dropout_p:
            rows = torch.arange(start, stop) * len(heads) + heads[:, None]
            kept = keep(int(seed), rows[..., None], torch.arange(keys), dropout_p).to(qkv.device)
            weights = weights * kept * dropout.scale(dropout_p)
        outputs.append((weights @ value[:, :keys]).transpose(0, 1))
    return torch.cat([*outputs, torch.zeros_like(qkv[int(offsets[-1]) :, 0])])


@contextmanager
def in_references() -> Iterator[None]:
    """Inside, references drop what the kernels drop."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(masked_attention, "masked_attention", _masked_attention))
        for module in (bias_dropout_residual, bias_gelu_dropout, mask_fill, residual_layer_norm):
            patches.enter_context(mock.patch.object(module, "kept_values", kept_values))
            patches.enter_context(mock.patch.object(module, "keep_scale", dropout.scale))
        yield
