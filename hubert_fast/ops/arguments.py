"""Arguments of operators: checks that several share, the seed of dropout, the dtype under autocast."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ContextManager, Optional

import torch
from torch import Tensor

SEED_RANGE = -(1 << 63), (1 << 63) - 1
"""Seeds of dropout masks are drawn from the first up to the second of these"""


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
    if residual.shape[1] != channels or (residual if index is None else index).shape[0] != rows:
        wanted = f"[{rows}, {channels}]" if index is None else f"[positions, {channels}] with an index of {rows}"
        given = "" if index is None else f" with an index of {len(index)}"
        raise ValueError(f"residual must have shape {wanted}; got {tuple(residual.shape)}{given}")


def dropout_seed(seed: Optional[Tensor], device: torch.device, **probabilities: float) -> Optional[Tensor]:
    """The seed of a call, a scalar int64 on ``device``: drawn from torch's default generator of that device where none is
    given, None where nothing is dropped. The host does not wait for it.

    Args:
        probabilities: that a value is dropped, each under its argument's name.

    Raises:
        ValueError: for a probability outside [0, 1), or a seed of another dtype, shape or device.
    """
    for name, p in probabilities.items():
        if not 0.0 <= p < 1.0:
            raise ValueError(f"{name} must be in [0, 1); got {p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.ndim != 0 or seed.device != device):
        raise ValueError(
            f"seed must be a scalar int64 tensor on {device}; got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    if not any(probabilities.values()):
        return None
    return torch.randint(*SEED_RANGE, (), device=device) if seed is None else seed


def autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    """The dtype autocast wants on ``device``, or None where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> ContextManager[Any]:
    """A context in which an implementation's own choice of dtypes holds."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
