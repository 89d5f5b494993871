"""SIGTERM and SIGINT as a request: finish the step, save, leave. A second signal acts at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingInterrupted(SystemExit):
    """Training stopped on a signal after saving ``checkpoint``. Leaves python with the shell's code for the signal."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(128 + signum)
        self.checkpoint = checkpoint
        name = signal.Signals(signum).name
        self.message = f"stopped by {name} after step {step}; saved {checkpoint}; resume to go on"


class StopRequest:
    """While entered, notes the first SIGTERM or SIGINT in ``signum`` (else 0); a second one has its usual effect.

    Who signals the whole process group also ends the data-loader workers. From the first signal on, their deaths are
    therefore no longer reported in the middle of a step, as torch's SIGCHLD handler does, but when a batch is fetched.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._stop_handlers: dict[int, Any] = {}
        self._child_handler: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._stop_handlers[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_stop_handlers()
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self._restore_stop_handlers()
        self._child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _restore_stop_handlers(self) -> None:
        while self._stop_handlers:
            signal.signal(*self._stop_handlers.popitem())
