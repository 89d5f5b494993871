"""The time that a run of the suite was given, and what is done in it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Counts from when it is made."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    _said: str = ""

    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self.seconds - self.spent()

    def say(self, doing: str) -> None:
        """What is being done from now on, on standard error, where it does not mix with tables; the same is said once."""
        if doing != self._said:
            print(f"[{self.spent():5.0f} of {self.seconds:.0f} s] {doing}", file=sys.stderr, flush=True)
        self._said = doing
