"""Peak memory of a piece of work on the CPU, as the operating system counts it (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path


def peak_of(work: Callable[[], object]) -> dict[str, int]:
    """Bytes: ``process_bytes``, the largest resident size while ``work`` ran, and ``step_bytes``, how far that lies above the
    resident size before (which holds the interpreter, torch and the model).
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    work()
    peak = _status("VmHWM")
    return {"process_bytes": peak, "step_bytes": peak - before}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not name {name}")
