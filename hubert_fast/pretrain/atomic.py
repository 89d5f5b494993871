"""Files that appear whole or not at all: write beside the target, flush to disk, then rename over it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that replaces it when the block ends well, and is removed when it does not.

    The temporary name keeps ``target``'s suffixes, because several writers choose their format by them.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}-{target.name}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield temporary
        # What the umask gives any new file: safetensors leaves files that only their owner may read.
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as temporary:
        # Names of files that are not UTF-8 are written as Python shows them.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_with(target: Path, writer: Callable[[Path], object]) -> None:
    """Call ``writer`` with a temporary path and move what it wrote to ``target``."""
    with atomic_path(target) as temporary:
        writer(temporary)


def _flush(path: Path) -> None:
    """Ask the disk for durability: without it a power cut can leave the new name with the old (or no) content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
