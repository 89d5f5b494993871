"""Clocks of the devices: the performance counter of a CPU, events in the queue of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# Some milliseconds on a GPU: longer than the host takes to start a call of an operator with its backward.
_QUEUED_CYCLES = 10_000_000


def device_seconds(call: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds that ``device`` takes for ``call``. A GPU gets something to do first, so that it does not wait for the host."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda._sleep(_QUEUED_CYCLES)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def synchronize(device: torch.device | str) -> None:
    """Wait until ``device`` has done what it was given; what went wrong there meanwhile is raised here."""
    torch.get_device_module(device).synchronize(device)
