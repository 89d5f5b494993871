"""Launches of ``bias_gelu_dropout``: forward and backward, with and without dropout, in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import bias_gelu_dropout as kernels
from hubert_fast.ops.bias_gelu_dropout import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    x = torch.empty(size.rows, size.ffn, dtype=dtype, device="meta")
    bias = torch.empty(size.ffn, device="meta")  # parameters stay in float32 under autocast
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for dropout_p in (0.1, 0.0):
        arguments = Arguments(x, bias, dropout_p, seed if dropout_p else None)
        kernels.forward(arguments, save=True)
        kernels.backward(arguments, [], (torch.empty_like(x),), [True, True])
