"""The time that a run of the suite was given."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Counts from when it is made."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self.seconds - self.spent()
