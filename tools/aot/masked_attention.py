"""Launches of ``masked_attention``: forward and backward, with and without dropout, in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import masked_attention as kernels
from hubert_fast.ops.masked_attention import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    qkv = torch.empty(size.rows, 3, size.heads, size.head_dim, dtype=dtype, device="meta")
    offsets = torch.empty(size.batch + 1, dtype=torch.int64, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    key_lengths = torch.empty(size.batch, dtype=torch.int64, device="meta")
    for lengths, dropout_p in ((None, 0.1), (None, 0.0), (key_lengths, 0.1)):
        arguments = Arguments(qkv, offsets, lengths, size.frames, dropout_p, seed if dropout_p else None)
        (out,), saved = kernels.forward(arguments, save=True)
        kernels.backward(arguments, [out, *saved], (torch.empty_like(out),), [True])
    kernels.forward(Arguments(qkv, offsets, None, size.frames, 0.0, None), save=False)  # as in evaluation
