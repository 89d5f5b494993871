"""The time that a run of the suite was given, and what is done in it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Seconds for a run, counted from when this is made."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    _said: str = ""

    def spent(self) -> float:
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self.seconds - self.spent()

    def say(self, doing: str) -> None:
        """Say on standard error, apart from the tables, which step begins; a step that is running is not said again."""
        if doing != self._said:
            print(f"[{self.spent():5.0f} of {self.seconds:.0f} s] {doing}", file=sys.stderr, flush=True)
        self._said = doing
