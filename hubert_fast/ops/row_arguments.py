"""Checks that operators on rows of channels share."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def check_rows(name: str, x: Tensor) -> None:
    """``x`` must be a float matrix."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating point of shape [rows, channels]; got {x.dtype} {tuple(x.shape)}")


def check_channels(channels: int, **vectors: Optional[Tensor]) -> None:
    """Each of ``vectors`` that is not None must be float of shape [channels]."""
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (channels,) or not vector.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point of shape [{channels}]; got {vector.dtype} {tuple(vector.shape)}"
            )


def check_index(index: Optional[Tensor]) -> None:
    """``index``, where there is one, must be a list of positions."""
    if index is not None and (index.dtype != torch.int64 or index.ndim != 1):
        raise ValueError(f"index must be int64 of shape [rows]; got {index.dtype} {tuple(index.shape)}")


def check_residual(residual: Tensor, rows: int, channels: int, index: Optional[Tensor]) -> None:
    """``residual`` must have a row for each of ``rows``, which ``index`` names where it is given."""
    check_rows("residual", residual)
    check_index(index)
    if residual.shape[1] != channels or (len(residual) if index is None else len(index)) != rows:
        wanted = f"[{rows}, {channels}]" if index is None else f"[positions, {channels}] with an index of {rows}"
        given = "" if index is None else f" with an index of {len(index)}"
        raise ValueError(f"residual must have shape {wanted}; got {tuple(residual.shape)}{given}")
