"""Times of calls on the device: whole, and what the host needs of them before it waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.clock import synchronize
from scripts.gpu_check.device import DEVICE


@dataclass
class Times:
    """Times of one side, in seconds."""

    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def take(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Add the times of a call, before which the device is idle."""
        synchronize(DEVICE)
        started = time.perf_counter()
        call(*arguments)
        self.host.append(time.perf_counter() - started)
        synchronize(DEVICE)
        self.whole.append(time.perf_counter() - started)

    def figures(self) -> dict[str, float]:
        """Median, 20th and 80th percentile, and the host's median, in milliseconds."""
        ordered, count = sorted(self.whole), len(self.whole)
        return {
            "ms": 1e3 * statistics.median(ordered),
            "p20_ms": 1e3 * ordered[count // 5],
            "p80_ms": 1e3 * ordered[4 * count // 5],
            "host_ms": 1e3 * statistics.median(self.host),
        }
