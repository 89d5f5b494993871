"""Launches of ``mask_fill``: forward and backward, with and without dropout and padding, in a model's shapes."""

from __future__ import annotations

import itertools

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import mask_fill as kernels
from hubert_fast.ops.mask_fill import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    rows = size.batch * size.frames
    x = torch.empty(rows, size.dim, dtype=dtype, device="meta")
    bias, embedding = (torch.empty(size.dim, device="meta") for _ in range(2))  # float32 under autocast
    mask, padding = (torch.empty(rows, dtype=torch.bool, device="meta") for _ in range(2))
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for dropout_p, fill in itertools.product((0.1, 0.0), (padding, None)):
        arguments = Arguments(x, bias, embedding, mask, fill, dropout_p, seed if dropout_p else None)
        kernels.forward(arguments, save=True)
        kernels.backward(arguments, [], (torch.empty_like(x),), [True] * 3)
