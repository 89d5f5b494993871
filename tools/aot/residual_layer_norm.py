"""Launches of ``residual_layer_norm``: post-norm, pre-norm and packing, with and without dropout, in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import residual_layer_norm as kernels


def launches(size: Size, dtype: torch.dtype) -> None:
    for dropout_p in (0.1, 0.0):
        _block(size, dtype, dropout_p, keep_sum=False)  # post-norm
        _block(size, dtype, dropout_p, keep_sum=True)  # pre-norm
        _packing(size, dtype, dropout_p)
    _packing(size, torch.float32, 0.1, out=dtype)  # where autocast meets float32 rows
    _packing(size, dtype, 0.1, out=torch.float32)  # where its post-norm stream begins


def _block(size: Size, dtype: torch.dtype, dropout_p: float, *, keep_sum: bool) -> None:
    update = torch.empty(size.rows, size.dim, dtype=dtype, device="meta")
    # Autocast's post-norm stream is float32.
    stream = dtype if keep_sum else torch.float32
    residual = torch.empty_like(update, dtype=stream)
    weight, bias, update_bias, seed = _vectors(size)
    seed = seed if dropout_p else None
    normed, summed, mean, rstd = kernels.residual_layer_norm(
        residual, weight, bias, update, update_bias, None, dropout_p, 0.0, seed, 1e-5, stream, True
    )
    kernels.residual_layer_norm_backward(
        torch.empty_like(normed), torch.empty_like(summed) if keep_sum else None, residual, summed, None, mean, rstd,
        weight, bias, update_bias, dropout_p, 0.0, seed, dtype, dropout_p == 0.0 and stream == dtype,
    )  # fmt: skip


def _packing(size: Size, dtype: torch.dtype, dropout_p: float, out: torch.dtype | None = None) -> None:
    residual = torch.empty(size.batch * size.frames, size.dim, dtype=dtype, device="meta")
    index = torch.empty(size.rows, dtype=torch.int64, device="meta")
    weight, bias, _, seed = _vectors(size)
    seed = seed if dropout_p else None
    normed, _, mean, rstd = kernels.residual_layer_norm(
        residual, weight, bias, None, None, index, 0.0, dropout_p, seed, 1e-5, out or dtype, False
    )
    kernels.residual_layer_norm_backward(
        torch.empty_like(normed),
        None,
        residual,
        None,
        index,
        mean,
        rstd,
        weight,
        bias,
        None,
        0.0,
        dropout_p,
        seed,
        normed.dtype,
        False,
    )


def _vectors(size: Size) -> tuple[torch.Tensor, ...]:
    """Weight, bias and bias of the update, float32 as they are under autocast, and a seed."""
    vectors = (torch.empty(size.dim, device="meta") for _ in range(3))
    return *vectors, torch.empty((), dtype=torch.int64, device="meta")
