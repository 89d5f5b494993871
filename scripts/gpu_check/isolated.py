"""Work in a process of its own that goes on after what broke it.

An illegal access on a GPU ends everything else in its process, and a kernel that hangs never gives it back. So a stage of several
items (checks, implementations) names the one it is at in a file; when its process dies or an item takes too long, that item is
noted as failed, and a new process does the rest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.gpu_check.facts import Facts

# Exit codes: the device is lost in this process, a new one may go on; Python itself failed, a new one would too.
LOST = 3
_FAILED = (1, 2)

_POLL_SECONDS = 0.2


class Items:
    """The items of a stage, in the process that does them.

    Args:
        facts: of the check.
        part: under which items are noted as failed; such an item is left out.
    """

    def __init__(self, facts: Facts, part: str) -> None:
        self._facts, self._part = facts, part
        self._running, self._begun = _running(facts, part), 0

    def left(self, names: Iterable[str]) -> Iterator[str]:
        """Those of ``names`` that no fact says are done or broken, each named as the running one before it is given."""
        for name in names:
            if name not in _over(self._facts, self._part):
                self.begin(name)
                yield name

    def begin(self, name: str) -> None:
        """Name the item that is to be held responsible if this process dies or hangs from here on."""
        self._begun += 1
        self._running.write_text(f"{self._begun} {name}")


def run(facts: Facts, part: str, module: str, *arguments: str, item_seconds: float, first_seconds: float) -> int:
    """Run ``module OUT ARGUMENTS...`` until it ends by itself; items that it dies or hangs at are noted under ``part``.

    Args:
        item_seconds: that an item may take.
        first_seconds: that a process may take to its first item, and that one.

    Returns:
        the exit code of the last process: 0 where everything that could be done was done.
    """
    running, died_at = _running(facts, part), set()
    while True:
        running.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", module, str(facts.out), *arguments])
        try:
            problem = _watch(process, running, item_seconds, first_seconds)
        except BaseException:  # the stage is over its limit: what it was at may be what hung
            process.kill()
            _note(facts, part, running, "interrupted: the stage's time was over")
            raise
        code = process.returncode
        if problem is None and code in (0, *_FAILED):
            running.unlink(missing_ok=True)
            return code
        item = _note(facts, part, running, problem or f"its process ended with {code}")
        if item is None or item in died_at:  # it would do so for ever
            return 1
        died_at.add(item)


def _watch(process: subprocess.Popen, running: Path, item_seconds: float, first_seconds: float) -> str | None:
    """Wait for the end of ``process``; what was wrong where it had to be killed."""
    began, at = time.monotonic(), 0
    while process.poll() is None:
        begun, _ = _read(running)
        if begun > max(at, 1):
            at, began = begun, time.monotonic()
        limit = first_seconds if begun <= 1 else item_seconds
        if time.monotonic() - began > limit:
            process.kill()
            try:
                process.wait(10)  # one that hangs inside the driver may not end at all
            except subprocess.TimeoutExpired:
                pass
            return f"hung: it was not done within {limit:.0f} s"
        time.sleep(_POLL_SECONDS)
    return None


def _note(facts: Facts, part: str, running: Path, failed: str) -> str | None:
    """Note that the item that was running failed, unless it said so itself; returns its name."""
    _, item = _read(running)
    running.unlink(missing_ok=True)
    if item is not None and item not in _over(facts, part):
        facts.note(part, item=item, failed=failed)
    return item


def _read(running: Path) -> tuple[int, str | None]:
    """How many items the process has begun, and the name of the last."""
    begun, _, item = running.read_text().partition(" ") if running.exists() else ("", "", "")
    return (int(begun), item) if item else (0, None)  # nothing where it is just being written


def _running(facts: Facts, part: str) -> Path:
    return facts.out / f"{part}.running"


def _over(facts: Facts, part: str) -> set[str]:
    """Items that are done or broken."""
    return {each["item"] for each in facts.of(part) if each.get("done") or "failed" in each}
