"""The dropout masks of fused operators: regenerated from a seed, never stored.

A seed starts a generator of its own, so the mask depends on nothing else, and forward and backward draw the same one.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

_LEVELS = 1 << 16


def keep_threshold(p: float) -> int:
    """A 16-bit draw below this is dropped: ``p`` to within 2^-17."""
    return round(p * _LEVELS)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by, so that the expectation is exactly unchanged."""
    return _LEVELS / (_LEVELS - keep_threshold(p))


def keep_mask(generator: torch.Generator, groups: int, numel: int, p: float) -> Tensor:
    """Bool ``[groups, numel]`` on the CPU, True with probability ``1 - p``, drawn group after group.

    Four 16-bit draws come from each 64-bit number; a group starts on a number of its own, so the groups may be drawn
    together or one at a time.
    """
    numbers = torch.empty(groups, -(-numel // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return (numbers.view(torch.int16) >= keep_threshold(p) - (_LEVELS >> 1))[:, :numel]


def dropped(x: Tensor, kept: Optional[Tensor], scale: float) -> Tensor:
    """``x`` with 0 where ``kept`` (bool, in its shape) is False and times ``scale`` elsewhere; ``x`` where it is None."""
    return x if kept is None else x * kept * scale
