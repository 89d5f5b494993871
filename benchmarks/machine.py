"""The machine and the software that a result comes from, as they stand in result files."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hubert_fast


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat a measurement: device, date and versions."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hubert_fast": hubert_fast.__version__,
        "commit": _commit(),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "triton": version("triton")}
    return facts


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def processor_flags() -> set[str]:
    """What the processor can do, in Linux' words; none where they are not known."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")


def memory_bytes(device: torch.device) -> int | None:
    """Of the device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _meminfo("MemTotal")


def available_bytes(device: torch.device) -> int | None:
    """What may still be taken; None where it is not known."""
    if device.type == "cuda":
        # What PyTorch's allocator holds and nothing uses counts as free.
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved - used
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)


def _commit() -> str | None:
    """Of the source tree that this file lies in, with "+" where tracked files were changed; None where it is no repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
