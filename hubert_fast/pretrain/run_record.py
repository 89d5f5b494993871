"""RUN/run.json: the audio of a run, and by which command, when and on which machine it was trained, each time."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.proc import proc_field
from hubert_fast.pretrain.run_summary import read_json


def record(run: Path, *, audio: Path | None = None, command: Sequence[str] | None = None) -> None:
    """Write ``run/run.json`` anew: with another start, and with the absolute path of the run's folder of speech, where given.

    A start is ``{"command", "date", "machine"}``. Call it from one process (rank 0).
    """
    values = recorded(run)
    if audio is not None:
        values["audio"] = str(audio.resolve())
    if command is not None:
        start = {"command": shlex.join(command), "date": now(), "machine": describe_machine()}
        values["starts"] = [*values.get("starts", []), start]
    atomic.write_text(run / "run.json", json.dumps(values, indent=2) + "\n")


def recorded(run: Path) -> dict[str, Any]:
    """``{"audio", "starts"}``, the starts oldest first, as far as they were recorded."""
    return read_json(run / "run.json") or {}


def now() -> str:
    """Local date and time, to the second, with its offset from UTC."""
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def describe_machine() -> dict[str, str]:
    """This machine and the software on it, in words. No host or user name: reports are mailed around."""
    import torch

    from hubert_fast._version import __version__

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = proc_field("cpuinfo", "model name") or platform.processor() or platform.machine()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": f"{processor}, {usable} of {os.cpu_count()} logical cores usable",
        "GPU": ", ".join(gpus) if gpus else "none",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hubert_fast": __version__,
    }
