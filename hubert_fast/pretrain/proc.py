"""What Linux says of the machine and of this process, in files of lines ``name: value``."""

from __future__ import annotations

from pathlib import Path


def proc_field(file: str, name: str) -> str | None:
    """The first ``name`` of ``/proc/file``; None where there is none, or no such file."""
    path = Path("/proc", file)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def proc_bytes(file: str, name: str) -> int | None:
    """A field in kB."""
    value = proc_field(file, name)
    return None if value is None else int(value.split()[0]) * 1024
