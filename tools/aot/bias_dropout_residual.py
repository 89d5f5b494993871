"""Launches of ``bias_dropout_residual``: forward and backward, with and without dropout, in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import bias_dropout_residual as kernels
from hubert_fast.ops.bias_dropout_residual import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    x = torch.empty(size.kept, size.dim, dtype=dtype, device="meta")
    residual = torch.empty(size.rows, size.dim, dtype=dtype, device="meta")
    index = torch.empty(size.kept, dtype=torch.int64, device="meta")
    bias = torch.empty(size.dim, device="meta")  # parameters stay in float32 under autocast
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for dropout_p in (0.1, 0.0):
        arguments = Arguments(x, bias, residual, index, dropout_p, seed if dropout_p else None)
        kernels.forward(arguments, save=True)
        kernels.forward(arguments._replace(residual=torch.empty_like(x), index=None), save=True)
        kernels.backward(arguments, [], (torch.empty_like(x),), [True] * 3)
