"""What time is: of the CPU the performance counter's, of a GPU the device's own, read from events in its queue.

now = clock(device)
start = now()
work()
seconds = now() - start
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# Some milliseconds on a GPU: longer than the host takes to start a call of an operator with its backward.
_QUEUED_CYCLES = 10_000_000


class Instant:
    """The moment at which the current stream gets here. The difference of two waits for the later one, and is in seconds."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Instant) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def clock(device: torch.device | str) -> Callable[[], Any]:
    """A function whose results are moments on ``device``; their differences are seconds."""
    return Instant if torch.device(device).type == "cuda" else time.perf_counter


def synchronize(device: torch.device | str) -> None:
    """Wait until ``device`` has done what it was given; what went wrong there meanwhile is raised here."""
    torch.get_device_module(device).synchronize(device)


def fill_queue(device: torch.device | str) -> None:
    """Give a GPU something to do while the host prepares, so that what follows runs without waiting for the host."""
    if torch.device(device).type == "cuda":
        torch.cuda._sleep(_QUEUED_CYCLES)
