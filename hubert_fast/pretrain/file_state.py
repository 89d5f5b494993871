"""Whether a file is still the one that the scan decoded."""

from __future__ import annotations

import os
import zlib
from functools import lru_cache
from typing import NamedTuple

_BLOCK = 1 << 20


class FileState(NamedTuple):
    """A file as it was found."""

    size: int  # bytes
    changed: int  # time of the last change, nanoseconds
    crc32: int  # of all its bytes


def file_state(path: str | os.PathLike[str]) -> FileState:
    """The state of a file now; OSError where it cannot be read."""
    found = os.stat(path)
    return FileState(found.st_size, found.st_mtime_ns, _crc32(path))


def is_unchanged(path: str, state: FileState) -> bool:
    """Whether a file still holds what it held; OSError where it cannot be read.

    Its bytes are looked at only where the time of its last change differs: a copy of a corpus is not another corpus.
    """
    found = os.stat(path)
    if found.st_size != state.size or found.st_mtime_ns == state.changed:
        return found.st_size == state.size
    return _crc32_of_change(path, found.st_mtime_ns) == state.crc32


@lru_cache(maxsize=100_000)  # a long recording is asked about once for each utterance in it
def _crc32_of_change(path: str, changed: int) -> int:
    return _crc32(path)


def _crc32(path: str | os.PathLike[str]) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
