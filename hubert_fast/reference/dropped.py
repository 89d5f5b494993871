"""Dropout with a given mask."""

from __future__ import annotations

from typing import Optional

from torch import Tensor


def dropped(x: Tensor, kept: Optional[Tensor], scale: float) -> Tensor:
    """``x`` with 0 where ``kept`` (bool, in its shape) is False and times ``scale`` elsewhere; ``x`` where it is None."""
    return x if kept is None else x * kept * scale
