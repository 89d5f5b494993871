"""One piece of memory for many tensors, each at an aligned place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional

import torch
from torch import Tensor

_ALIGNMENT = 64  # elements


def flat_memory(tensors: Sequence[Tensor], dtype: Optional[torch.dtype] = None) -> Tensor:
    """Zeros for as many values as ``tensors`` have, on their device, in ``dtype`` (None: theirs)."""
    if not tensors:
        return torch.empty(0)
    return tensors[0].new_zeros(sum(map(_room, tensors)), dtype=dtype, requires_grad=False)


def views_of(flat: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The part of ``flat`` for each of ``tensors``, in its shape."""
    start = 0
    for tensor in tensors:
        yield flat[start : start + tensor.numel()].view(tensor.shape)
        start += _room(tensor)


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
