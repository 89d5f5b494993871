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


def record_start(run: Path, command: Sequence[str]) -> None:
    """Append this start, ``{"command", "date", "machine"}``, to ``run/run.json``. Call it from one process (rank 0)."""
    start = {"command": shlex.join(command), "date": now(), "machine": describe_machine()}
    _update(run, starts=[*recorded_starts(run), start])


def record_audio(run: Path, audio: Path) -> None:
    """Keep the absolute path of the folder of speech that the run is about."""
    _update(run, audio=str(Path(audio).resolve()))


def recorded_audio(run: Path) -> Path | None:
    """The folder of `record_audio`, None where none was recorded."""
    audio = _record(run).get("audio")
    return None if audio is None else Path(audio)


def recorded_starts(run: Path) -> list[dict[str, Any]]:
    """The starts recorded so far, oldest first."""
    return _record(run).get("starts", [])


def _record(run: Path) -> dict[str, Any]:
    return read_json(Path(run) / "run.json") or {}


def _update(run: Path, **values: Any) -> None:
    atomic.write_text(Path(run) / "run.json", json.dumps({**_record(run), **values}, indent=2) + "\n")


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
