"""The tests that want a GPU, by pytest; each result is a line of OUT/tests.jsonl the moment it is there.

    python -m scripts.gpu_check.gpu_tests OUT most|kernels|large

pytest-xdist shows tracebacks at the very end, which a run that is stopped never reaches. Here the process that hands the tests
out writes, and what failed is noted again at the end.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from scripts.gpu_check.device import ON_GPU
from scripts.gpu_check.facts import Facts, facts_of_process

# They want tens of gigabytes, and skip where others hold them: so they come alone.
LARGE = (
    "tests/ops/test_conv_frontend_gpu.py::test_more_than_two_to_the_31_activations",
    "tests/kernels/test_masked_attention.py::TestStepsOnGpu::test_rows_beyond_two_to_the_31_values",
)

# The kernels' tests are many, draw their shapes, and spend their time on compiling; so they come after all others.
FOLDERS = {
    "most": ("tests/ops", "tests/models", "tests/benchmarks/test_peers.py", "tests/kernels/test_row_passes_gpu.py"),
    "kernels": ("tests/kernels",),
}

_PROCESSES = 12 if ON_GPU else 2
_SHOWN = 12  # failures

# What a CPU runs to try the script: these skip there in seconds.
_ON_CPU = "tests/ops/test_conv_frontend_gpu.py"


class Recorder:
    """A plugin of pytest: a line for each test, with what went wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "seconds": round(report.duration, 2),
                "why": _why(report)}  # fmt: skip
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _why(report: pytest.TestReport) -> str:
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
        return " | ".join(lines)[:1500] or report.longreprtext[-600:]
    return str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""


def main() -> int:
    facts, which = facts_of_process(), sys.argv[2]
    path = facts.out / "tests.jsonl"
    before = len(_read(path))

    def stop(*_: object) -> None:
        """pytest-xdist takes longer to end by itself than a stage that is over its time is given."""
        _note(facts, which, _read(path)[before:])
        os._exit(2)

    signal.signal(signal.SIGINT, stop)
    code = pytest.main(arguments(which), plugins=[Recorder(path)])
    _note(facts, which, _read(path)[before:])
    return int(code)


def arguments(which: str) -> list[str]:
    """Those of pytest."""
    common = ["-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", "--timeout=150"]  # some compile
    if which == "large":
        return [*common, *LARGE]
    common += [option for test in LARGE for option in ("--deselect", test)]
    if importlib.util.find_spec("xdist") is not None:
        common += ["-n", str(_PROCESSES), "--dist", "worksteal"]
    return [*common, *(FOLDERS[which] if ON_GPU else [_ON_CPU])]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _note(facts: Facts, which: str, results: list[dict]) -> None:
    outcomes = dict(collections.Counter(each["outcome"] for each in results))
    slowest = sorted(results, key=lambda each: -each["seconds"])[:3]
    skips = collections.Counter(each["why"] for each in results if each["outcome"] == "skipped").most_common(4)
    facts.note("tests", which=which, outcomes=outcomes, skipped_because=skips,
               slowest=[[each["test"].rpartition("/")[2], each["seconds"]] for each in slowest])  # fmt: skip
    failed = [each for each in results if each["outcome"] == "failed"]
    for each in failed[:_SHOWN]:
        facts.note("failed test", test=each["test"], why=each["why"][:300])


if __name__ == "__main__":
    sys.exit(main())
