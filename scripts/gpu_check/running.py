"""Runs stages, each a process under its limit, and says how each one ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from scripts.gpu_check.facts import Facts
from scripts.gpu_check.show import lines_of, render

# An interrupted process says what it has (pytest does, and the suite); one that does not end by then is killed.
_GRACE_SECONDS = 8
# Nothing begins with less.
_LEAST_SECONDS = 3
# A CPU, which tries the script, may be busy with other things, and nothing is learned from how long it takes.
_PATIENCE = {"cuda": 1, "cpu": 5}

_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b|^(ERROR|error): |cannot be built")
# pip's last words, such as "error: metadata-generation-failed", say nothing.
_EMPTY_ERROR = re.compile(r"rror: [a-z]+(-[a-z]+)+$")


@dataclass(frozen=True)
class Stage:
    """One step of the check.

    ``command`` is made when the stage begins, from the check's folder and device; None: there is nothing to do on it.
    """

    name: str
    says: str  # one line for --help
    limit: int  # seconds at most
    command: Callable[[Path, str], Optional[list[str]]]
    shows: tuple[str, ...] = ()  # parts of the facts that are printed after it
    beside: bool = False  # it runs beside the next stage, and is waited for before the one after that


class Runner:
    """Runs stages in the time that is left.

    Args:
        facts: what is known is noted there.
        seconds: for all stages together.
        device: "cuda" or "cpu".
    """

    def __init__(self, facts: Facts, *, seconds: float, device: str) -> None:
        self._facts, self._device = facts, device
        self._started = time.monotonic()
        self._seconds = seconds
        self._log = facts.out / "log.txt"
        self._beside: Optional[_Running] = None
        self._waited = False
        self._summary: list[str] = []
        self.all_well = True

    def run(self, stage: Stage) -> None:
        """Run ``stage`` to its end or its limit."""
        if self._beside is not None and self._waited:
            self._end_beside()
        self._waited = self._beside is not None
        command = stage.command(self._facts.out, self._device)
        if command is None:
            return
        limit = min(_PATIENCE[self._device] * stage.limit, self._seconds - self.spent() - _GRACE_SECONDS)
        if limit < _LEAST_SECONDS:
            self._note(stage, 0.0, "no time was left")
            return
        running = _Running(stage, command, limit, self._log, self._environment(), len(self._facts.all()))
        if stage.beside:
            self._beside, self._waited = running, False
            return
        self._end(running)

    def finish(self) -> None:
        """End what runs beside, and print measured beside predicted, and how each stage ended."""
        if self._beside is not None:
            if sys.exc_info()[0] is not None:  # interrupted: nothing is waited for
                self._beside.kill()
            self._end_beside()
        lines = [*render(self._facts), *self._summary]
        (self._facts.out / "summary.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))

    def spent(self) -> float:
        """Seconds since the check began."""
        return time.monotonic() - self._started

    def _end_beside(self) -> None:
        running, self._beside = self._beside, None
        self._end(running)

    def _end(self, running: _Running) -> None:
        try:
            status = running.wait()
        except BaseException:  # interrupted: the stage's process must not outlive the check
            running.kill()
            self._note(running.stage, running.seconds(), "interrupted")
            raise
        self._note(running.stage, running.seconds(), status)
        for line in lines_of(running.facts(self._facts), running.stage.shows):
            print(line, flush=True)

    def _note(self, stage: Stage, seconds: float, status: str) -> None:
        self.all_well &= status == "ok"
        self._facts.note("stage", name=stage.name, seconds=round(seconds, 1), status=status)
        self._summary.append(f"{self.spent():5.0f} s  {stage.name:12} {seconds:5.0f} s  {status}")

    def _environment(self) -> dict[str, str]:
        # Wheels that `install` puts there, before anything of the environment's own.
        paths = [str(wheels_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Tiny sizes are done sooner by one thread, which waits for no other on a busy machine.
        threads = {"OMP_NUM_THREADS": "1"} if self._device == "cpu" else {}
        return {
            # Kernels that `warm` compiles are found by all later processes, and by those alone.
            "TRITON_CACHE_DIR": str(Path(tempfile.gettempdir(), "gpu-check-triton")),
            **os.environ,
            **threads,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "GPU_CHECK_DEVICE": self._device,
        }


def wheels_folder() -> Path:
    """Where the wheels that the environment lacks are installed."""
    return Path(tempfile.gettempdir(), "gpu-check-wheels")


class _Running:
    """A stage's process. Its output goes to the log."""

    def __init__(
        self, stage: Stage, command: list[str], limit: float, log: Path, environment: dict[str, str], before: int
    ) -> None:
        self.stage, self._limit, self._log, self._before = stage, limit, log, before
        self._started = time.monotonic()
        with log.open("a") as file:
            file.write(f"\n== {stage.name} ({limit:.0f} s at most): {' '.join(command)}\n")
        self._begin = log.stat().st_size
        with log.open("a") as file:
            # A group of its own, so that what it started ends with it; no session, or it would outlive a check that is killed.
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                preexec_fn=_in_a_group,
            )  # fmt: skip

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def facts(self, facts: Facts) -> list[dict[str, Any]]:
        """Those that were noted since it began."""
        return facts.all()[self._before :]

    def wait(self) -> str:
        """How it ended: "ok", or what went wrong."""
        try:
            code = self._process.wait(max(0.0, self._limit - self.seconds()))
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGINT)
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            self.kill()
            return f"stopped after {self._limit:.0f} s"
        self._signal(signal.SIGKILL)  # whatever it left behind
        return "ok" if code == 0 else f"failed ({code}): {self._complaint()}"

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        try:
            self._process.wait(_GRACE_SECONDS)  # a process that hangs inside the driver may not end at all
        except subprocess.TimeoutExpired:
            pass

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass

    def _complaint(self) -> str:
        """The line of its output that says most: the last that names an error, else the last."""
        with self._log.open("rb") as file:
            file.seek(self._begin)
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("{")]
        errors = [line for line in lines if _ERROR.search(line) and not _EMPTY_ERROR.search(line)]
        return (errors or lines or ["it said nothing"])[-1][:200]


def _in_a_group() -> None:
    os.setpgrp()
    # Where the check itself was started with the signal ignored, Python would ignore it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def module(name: str, *arguments: str) -> Callable[[Path, str], list[str]]:
    """The command of a stage that is ``scripts/gpu_check/<name>.py``."""
    return lambda out, device: [sys.executable, "-m", f"scripts.gpu_check.{name}", str(out), *arguments]
