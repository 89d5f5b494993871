"""Work in a process of its own that goes on after what broke it.

An illegal access on a GPU ends everything else in its process. So a stage of several items (checks, implementations) names the
one it is at in a file; when its process dies, that item is noted as failed, and a new process does the rest.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator

from scripts.gpu_check.facts import Facts

# Exit codes: the device is lost in this process, a new one may go on; Python itself failed, a new one would too.
LOST = 3
_FAILED = (1, 2)


class Items:
    """The items of a stage, in the process that does them.

    Args:
        facts: of the check.
        part: under which items are noted as failed; such an item is left out.
    """

    def __init__(self, facts: Facts, part: str) -> None:
        self._facts, self._part = facts, part
        self._running = facts.out / f"{part}.running"

    def left(self, names: Iterable[str]) -> Iterator[str]:
        """Those of ``names`` that no fact says are done or broken, each named as the running one before it is given."""
        over = _over(self._facts, self._part)
        for name in names:
            if name not in over:
                self.begin(name)
                yield name

    def begin(self, name: str) -> None:
        """Name the item that is to be held responsible if this process dies from here on."""
        self._running.write_text(name)


def run(facts: Facts, part: str, module: str, *arguments: str) -> int:
    """Run ``module OUT ARGUMENTS...`` until it ends by itself; items that it dies at are noted under ``part``.

    Returns:
        the exit code of the last process: 0 where everything that could be done was done.
    """
    running = facts.out / f"{part}.running"
    while True:
        running.unlink(missing_ok=True)
        code = subprocess.run([sys.executable, "-m", module, str(facts.out), *arguments]).returncode
        item = running.read_text() if running.exists() else None
        running.unlink(missing_ok=True)
        if code == 0 or code in _FAILED or item is None:
            return code
        if item not in _over(facts, part):  # else it said itself what went wrong
            facts.note(part, item=item, failed=f"its process ended with {code}")


def _over(facts: Facts, part: str) -> set[str]:
    """Items that are done or broken."""
    return {each["item"] for each in facts.of(part) if each.get("done") or "failed" in each}
