"""Launches of ``residual_layer_norm`` at each place of a model, post-norm and pre-norm, with and without dropout."""

from __future__ import annotations

from typing import Optional

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import residual_layer_norm as kernels
from hubert_fast.ops.residual_layer_norm import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    for indexed in (True, False):  # features: packed, and where no frame is padding
        _norm(size.batch * size.frames, size.rows if indexed else None, size.conv_channels, dtype, dtype)
        _norm(size.batch * size.frames, size.rows if indexed else None, size.conv_channels, torch.float32, dtype)
    for dropout_p in (0.1, 0.0):
        for kept in (None, size.kept):  # of the last layer only the masked frames go on
            # Post-norm, whose stream is float32 under autocast; pre-norm.
            _sum(size, dtype, torch.float32, kept, dropout_p, sum_wanted=False)
            _sum(size, dtype, dtype, kept, dropout_p, sum_wanted=True)
        _norm(size.rows, None, size.dim, dtype, torch.float32, dropout_p)  # where a post-norm stream begins
    _norm(size.rows, None, size.dim, dtype, dtype)  # before attention in a pre-norm layer


def _norm(
    positions: int, rows: Optional[int], channels: int, dtype: torch.dtype, out: torch.dtype, dropout_p: float = 0.0
) -> None:
    """Of a matrix as it is; ``rows`` of its positions where an index says which."""
    residual = torch.empty(positions, channels, dtype=dtype, device="meta")
    weight, bias, _, seed = _vectors(channels, dropout_p)
    index = None if rows is None else _index(rows)
    settings = index, 0.0, dropout_p, seed, 1e-5, out, False
    _both_ways(Arguments(residual, weight, bias, None, None, *settings))


def _sum(
    size: Size, dtype: torch.dtype, stream: torch.dtype, kept: Optional[int], dropout_p: float, *, sum_wanted: bool
) -> None:
    """Of the stream after an update."""
    residual = torch.empty(size.rows, size.dim, dtype=stream, device="meta")
    update = torch.empty(kept or size.rows, size.dim, dtype=dtype, device="meta")
    weight, bias, update_bias, seed = _vectors(size.dim, dropout_p)
    index = None if kept is None else _index(kept)
    settings = index, dropout_p, 0.0, seed, 1e-5, stream, sum_wanted
    _both_ways(Arguments(residual, weight, bias, update, update_bias, *settings))


def _both_ways(arguments: Arguments) -> None:
    (normed, summed), saved = kernels.forward(arguments, save=True)
    gradients = torch.empty_like(normed), torch.empty_like(summed) if arguments.with_sum else None
    kernels.backward(arguments, [summed, *saved], gradients, [True] * 5)


def _index(rows: int) -> torch.Tensor:
    return torch.empty(rows, dtype=torch.int64, device="meta")


def _vectors(channels: int, dropout_p: float) -> tuple[Optional[torch.Tensor], ...]:
    """Weight, bias and bias of the update, float32 as they are under autocast, and a seed where one is needed."""
    vectors = (torch.empty(channels, device="meta") for _ in range(3))
    return *vectors, torch.empty((), dtype=torch.int64, device="meta") if dropout_p else None
