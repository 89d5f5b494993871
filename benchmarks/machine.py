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
from hubert_fast.pretrain.proc import proc_bytes, proc_field


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
    return proc_field("cpuinfo", "model name") or platform.machine()


def processor_flags() -> set[str]:
    """What the processor can do, in Linux' words; none where they are not known."""
    return set((proc_field("cpuinfo", "flags") or "").split())


def memory_bytes(device: torch.device) -> int | None:
    """Of the device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return proc_bytes("meminfo", "MemTotal")


def available_bytes(device: torch.device) -> int | None:
    """What may still be taken; None where it is not known."""
    if device.type == "cuda":
        # What PyTorch's allocator holds and nothing uses counts as free.
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved - used
    return proc_bytes("meminfo", "MemAvailable")


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
