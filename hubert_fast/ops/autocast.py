"""How operators meet autocast: they compute in its dtype, keep what needs float32 in float32, and switch it off inside."""

from __future__ import annotations

from typing import Optional

import torch


def autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    """The dtype autocast wants on ``device``, or None where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which an implementation's own choice of dtypes holds."""
    return torch.autocast(device.type, enabled=False)
