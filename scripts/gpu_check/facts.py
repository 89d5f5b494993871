"""Facts of a check: one JSON line each in OUT/results.jsonl, on disk the moment it is known.

A process that an illegal access, a limit or a full machine ends takes nothing with it that was noted before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_STARTED = time.monotonic()


class Facts:
    """Writes and reads the lines of one check.

    Args:
        out: the check's folder, which exists.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "results.jsonl"

    def note(self, part: str, **facts: Any) -> None:
        """Append a line: ``part``, the seconds since this process began, and ``facts`` (plain values; others as text)."""
        line = json.dumps({"part": part, "s": round(time.monotonic() - _STARTED, 2), **facts}, default=str)
        with self.path.open("a") as file:  # opened anew: several processes write, one after another
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)

    def of(self, part: str) -> list[dict[str, Any]]:
        """The facts of ``part``, in order. A line that was cut off while it was written is none."""
        return [each for each in self.all() if each["part"] == part]

    def all(self) -> list[dict[str, Any]]:
        """Every fact, in order."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found


def facts_of_process() -> Facts:
    """The facts of the stage that this process is: the first argument is OUT."""
    return Facts(Path(sys.argv[1]))
