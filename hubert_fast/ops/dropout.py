"""The arguments that operators with dropout share: a probability, and a seed that says which values are dropped."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


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
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device) if seed is None else seed
