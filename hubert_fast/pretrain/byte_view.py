"""Bytes of a file without reading it whole: a window for those who search it, a mended copy for the decoder."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Union

Piece = Union[bytes, tuple[int, int]]
"""bytes that stand for themselves, or [start, stop) of a file"""

_WINDOW = 1 << 20


class ByteWindow:
    """A file that is searched from its start to its end, a megabyte of it in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = str(path)
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._start = 0
        self._bytes = b""

    def read(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` on, fewer at the end of the file."""
        offset = start - self._start
        if offset < 0 or offset + count > len(self._bytes):
            self._file.seek(start)
            self._bytes = self._file.read(max(count, _WINDOW))
            self._start, offset = start, 0
        return self._bytes[offset : offset + count]

    def find(self, pattern: bytes, start: int, stop: int | None = None) -> int:
        """Where ``pattern`` first begins in [start, stop), or -1."""
        stop = self.size if stop is None else min(stop, self.size)
        while start < stop:
            self.read(start, len(pattern))
            found = self._bytes.find(pattern, start - self._start)
            if found >= 0:
                return self._start + found if self._start + found < stop else -1
            start = max(start + 1, self._start + len(self._bytes) - len(pattern) + 1)
        return -1

    def only_zeros(self, start: int) -> bool:
        """Whether nothing but zeros follows ``start``."""
        blocks = (self.read(position, _WINDOW) for position in range(start, self.size, _WINDOW))
        return not any(block.strip(b"\0") for block in blocks)


class ByteView(io.RawIOBase):
    """Pieces of a file, and bytes between them, as one file to read."""

    def __init__(self, path: str, pieces: Sequence[Piece]) -> None:
        self._file = open(path, "rb", buffering=0)
        self._pieces = pieces
        lengths = (len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
        self._stops = list(accumulate(lengths))
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stops[-1]}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer).cast("B")
        done = 0
        while done < len(wanted):
            data = self._next(len(wanted) - done)
            if not data:
                break
            wanted[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _next(self, count: int) -> bytes:
        index = bisect_right(self._stops, self._position)
        if index == len(self._stops):
            return b""
        piece, left = self._pieces[index], self._stops[index] - self._position
        if isinstance(piece, bytes):
            return piece[len(piece) - left :][:count]
        self._file.seek(piece[1] - left)
        return self._file.read(min(count, left))

    def close(self) -> None:
        self._file.close()
        super().close()
