"""Columns of numbers in one file: written in any order, read as memory maps, verified by a hash.

The file is one of safetensors, which any of its readers opens. It has few tensors whatever the number of utterances, so its
header stays small; processes that read it share its pages, and what they never ask for is never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hubert_fast.pretrain.atomic import atomic_path

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "I64": np.int64, "I32": np.int32, "I16": np.int16, "U32": np.uint32, "U8": np.uint8,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8  # of the header, little-endian, before it
_LARGEST_HEADER = 100_000_000  # what safetensors reads
_BLOCK = 1 << 24
_HASH = "sha256"
_NO_HASH = "0" * 64  # in the place of the hash while it is computed


class DamagedFileError(OSError):
    """A file of columns that is cut short, altered or of another format."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}; a damaged file is made anew once it is deleted")


class Columns(Mapping[str, np.ndarray]):
    """The columns of a file by name, each a read-only array whose pages are read as they are touched.

    ``metadata`` holds the writer's texts, ``sha256`` the hash that it left of all that is in the file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: its header is not one that `new_columns` wrote, or the file is not as long as it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._header, self._first_byte = _read_header(self.path)
        metadata = dict(self._header.pop("__metadata__", {}))
        self.sha256 = metadata.pop(_HASH, "")
        self.metadata = metadata
        self._file: np.ndarray | None = None
        end = max((tensor["data_offsets"][1] for tensor in self._header.values()), default=0)
        size = self.path.stat().st_size
        if size != self._first_byte + end:
            raise DamagedFileError(self.path, f"its header says {self._first_byte + end} bytes, it has {size}")

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._header[name]
        first, last = (self._first_byte + place for place in tensor["data_offsets"])
        if self._file is None:
            self._file = np.memmap(self.path, mode="r")
        return self._file[first:last].view(_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def verify(self) -> None:
        """Read the whole file; DamagedFileError where it is not what was written."""
        if _hash_of(self.path, self.sha256) != self.sha256:
            raise DamagedFileError(self.path, "it is not what was written (its hash differs)")


class NewColumns:
    """Columns that are being written; what is not written is 0."""

    def __init__(self, file: int, dtypes: Mapping[str, np.dtype], first_bytes: Mapping[str, int]) -> None:
        self._file, self._dtypes, self._first_bytes = file, dtypes, first_bytes

    def put(self, name: str, values: np.ndarray, first: int = 0) -> None:
        """Write ``values`` from place ``first`` of a column on."""
        dtype = self._dtypes[name]
        data = memoryview(np.ascontiguousarray(values, dtype=dtype)).cast("B")
        place = self._first_bytes[name] + first * dtype.itemsize
        while len(data):
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written


@contextmanager
def new_columns(
    path: Path, columns: Mapping[str, tuple[Any, int]], metadata: Mapping[str, str]
) -> Iterator[NewColumns]:
    """Columns to write in any order, which are the file ``path`` once the block has ended well.

    Args:
        columns: the dtype and the length of each.
        metadata: texts to keep with them.

    Raises:
        OSError: there is no room for the file, which is found before anything is written.
    """
    dtypes = {name: np.dtype(dtype) for name, (dtype, _) in columns.items()}
    header: dict[str, Any] = {"__metadata__": {**metadata, _HASH: _NO_HASH}}
    end = 0
    for name in sorted(columns, key=lambda name: -dtypes[name].itemsize):  # so that every array is aligned
        first, end = end, end + dtypes[name].itemsize * columns[name][1]
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": [columns[name][1]], "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    header_bytes = _LENGTH_BYTES + len(text)
    first_bytes = {name: header_bytes + header[name]["data_offsets"][0] for name in columns}
    with atomic_path(Path(path)) as temporary, open(temporary, "r+b") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.flush()
        _reserve(file.fileno(), header_bytes + end)
        yield NewColumns(file.fileno(), dtypes, first_bytes)
        file.seek(_LENGTH_BYTES + text.index(_NO_HASH.encode()))
        file.write(_hash_of(temporary, _NO_HASH).encode())


def write_columns(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write the file ``path`` from arrays."""
    with new_columns(path, {name: (each.dtype, len(each)) for name, each in columns.items()}, metadata) as file:
        for name, each in columns.items():
            file.put(name, each)


class Strings(Sequence[str]):
    """Texts in two columns: their bytes (UTF-8), one after another, and where each ends."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> Strings:
        encoded = [each.encode() for each in texts]
        ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        first = self.ends[index - 1] if index else 0
        return self.text[first : self.ends[index]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        text, first = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[first:end].decode()
            first = end


def _reserve(file: int, size: int) -> None:
    """Take room for a file of ``size`` bytes, zeros beyond its end."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the place of the first byte after it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_LARGEST_HEADER, path.stat().st_size):
            raise DamagedFileError(path, "it has no header")
        try:
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name != "__metadata__":
                    first, last = tensor["data_offsets"]
                    if not 0 <= first <= last or last - first != _size(tensor):
                        raise ValueError(f"column {name!r} lies in [{first}, {last})")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(path, f"its header is damaged ({error})") from error
    return header, _LENGTH_BYTES + length


def _size(tensor: Mapping[str, Any]) -> int:
    return np.dtype(_DTYPES[tensor["dtype"]]).itemsize * math.prod(tensor["shape"])


def _hash_of(path: Path, written: str) -> str:
    """The hash of a file in which the hash itself, which is ``written`` there, does not count."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        digest.update(file.read(length).replace(written.encode(), _NO_HASH.encode(), 1))
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
