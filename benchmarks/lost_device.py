"""A device that an implementation made unusable: after an illegal access or a failed assertion every call of CUDA fails in that
process. What is left is measured in a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .clock import synchronize
from .report import LeftOut, Report

ALL = "all"  # no implementation in particular


class DeviceLost(RuntimeError):
    """Nothing more can be measured in this process. The report says what happened, and is to be saved before anything else:
    freeing memory of such a device may end the process."""


def answers(device: torch.device | str) -> bool:
    """Whether ``device`` still works. An error of one call alone, such as running out of memory, is gone once it was raised."""
    try:
        synchronize(device)
    except RuntimeError:
        return False
    return True


def works_here(device: torch.device) -> bool:
    """Whether this process, which has not used ``device`` yet, can."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return False
    return answers(device)


def lost(report: Report, case: str, implementation: str, error: Exception, *, rejected: bool = False) -> DeviceLost:
    """Note that ``implementation`` made the device unusable in ``case``; returns what is to be raised."""
    said = f"it made the device unusable: {first_line(error)}"
    report.left_out.append(LeftOut(case, implementation, said, rejected, lost_device=True))
    return DeviceLost(f"{case}: {implementation}: {said}")


def why_no_more(report: Report, implementation: str, is_alike: Callable[[str], bool]) -> str | None:
    """A sentence that says why ``implementation`` is not run again, or None.

    One that made the device unusable in a case ``is_alike`` probably does so again, and each time costs a process.
    """
    for each in report.left_out:
        if each.lost_device and each.implementation == implementation and is_alike(each.case):
            return f"not run: it made the device unusable in another case ({each.case})"
    return None


def first_line(error: Exception) -> str:
    """The error's type and the first line of what it says; CUDA's say the same for several lines more."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
