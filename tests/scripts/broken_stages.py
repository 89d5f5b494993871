"""Stages of the GPU check in which something breaks, run as `scripts.gpu_check.isolated` runs them.

python -m tests.scripts.broken_stages OUT items|smoke|step
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from scripts.gpu_check import isolated
from scripts.gpu_check.facts import facts_of_process

STEP_THAT_LOSES = 8  # the first is timed by itself, four warm up, one is for memory


def items() -> int:
    """The item "lost" loses its device, "killed" its process, "hangs" does not end; the others are done."""
    facts = facts_of_process()
    for name in isolated.Items(facts, "items").left(["first", "hangs", "lost", "killed", "last"]):
        if name == "hangs":
            time.sleep(60)
        if name == "lost":
            return isolated.LOST
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        facts.note("items", item=name, done=True)
    return 0


class LostDevice:
    """A device that an illegal access made unusable: the call that finds out raises, and so does every later one."""

    lost = False

    def fail(self, *_: Any, **__: Any) -> None:
        self.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def answers(self, _: Any) -> bool:
        return not self.lost


def smoke() -> int:
    """The real stage but for the comparisons; the second check loses the device."""
    from scripts.gpu_check import smoke

    device = LostDevice()

    def compare(check: smoke.Check) -> dict[str, object]:
        return device.fail() if check.name == "all, float32" or device.lost else {"ok": True}

    smoke.answers, smoke._compare, smoke._dropout = device.answers, compare, compare
    sys.argv = [sys.argv[0], sys.argv[1], "here"]
    return smoke.main()


def step() -> int:
    """The real stage; torchaudio's steps lose the device once they are measured in turn."""
    from benchmarks import training
    from scripts.gpu_check import step

    device, call, calls = LostDevice(), training.TrainingStep.__call__, []

    def failing(self: training.TrainingStep, batch: Any, dtype: Any) -> None:
        theirs = "torchaudio" in type(self.model.module).__module__
        calls.append(theirs)
        if device.lost or (theirs and sum(calls) == STEP_THAT_LOSES):
            device.fail()
        call(self, batch, dtype)

    training.TrainingStep.__call__, step.answers = failing, device.answers
    sys.argv = [sys.argv[0], sys.argv[1], "ours", "here"]
    return step.main()


if __name__ == "__main__":
    sys.exit({each.__name__: each for each in (items, smoke, step)}[sys.argv[2]]())
