"""The manifest: the utterances of a split, as a table that serves millions of them.

``RUN/manifest/<split>.safetensors`` has a row for each recording and one for each utterance (see `columns`). A recording
longer than a minute is several utterances. An utterance's id is its recording's path relative to the folder of audio,
suffix included, with ``#<number>`` where the recording has several.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hubert_fast.pretrain.audio import resampled_length
from hubert_fast.pretrain.columns import Columns, Strings, write_columns
from hubert_fast.pretrain.file_state import FileState
from hubert_fast.pretrain.phones import Phone, PhoneColumns

SPLITS = ("train", "valid")
_PART = re.compile(r"#\d{4,}$")


class Recordings:
    """Files of audio as the scan decoded them, in its order; few bytes for each, because there may be millions."""

    def __init__(self) -> None:
        self.paths: list[str] = []  # relative to the folder of audio
        self._numbers = array("q")

    def __len__(self) -> int:
        return len(self.paths)

    def add(
        self, path: str, *, rate: int, samples: int, state: FileState, channel: int | None = None, plain: int = 0
    ) -> None:
        """``rate`` in Hz, ``samples`` of each channel; ``channel`` and ``plain`` as of an `Utterance`."""
        self.paths.append(path)
        self._numbers.extend((rate, -1 if channel is None else channel, samples, *state, plain))

    def numbers(self) -> np.ndarray:
        """int64 ``[recordings, 7]``: rate, channel (-1: all), samples, size, time of the last change, crc32, plain."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, 7)


class Utterance(NamedTuple):
    """A recording or a part of one."""

    id: str
    path: str  # absolute
    start: int  # samples at ``rate``
    length: int  # samples at ``rate``
    rate: int  # Hz
    channel: int | None  # that is taken, counted from 0; None: the mean of all
    state: FileState
    plain: int  # how the file is read (`layout.plain_kind`)

    @property
    def samples(self) -> int:
        """Samples at 16 kHz."""
        return resampled_length(self.length, self.rate)


class Manifest(Sequence[Utterance]):
    """The utterances of a split, in the order of their ids.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is not what the scan wrote.
    """

    def __init__(self, path: Path) -> None:
        columns = Columns(path)
        columns.verify()
        self.path, self.sha256 = Path(path), columns.sha256
        self.audio = Path(columns.metadata["audio"])
        self._columns = columns
        self._paths = Strings(columns["paths"], columns["path_ends"])
        self._recordings, self._parts = columns["recordings"], columns["parts"]
        rates = columns["rates"][self._recordings].astype(np.int64)
        self.samples: np.ndarray = resampled_length(columns["lengths"], rates)
        """int64 ``[utterances]``, at 16 kHz"""
        self._phones = PhoneColumns.read(columns)

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return Manifest, (self.path,)  # memory maps would be sent as the numbers in them

    def __len__(self) -> int:
        return len(self._recordings)

    def __getitem__(self, index: int) -> Utterance:
        columns, recording = self._columns, int(self._recordings[index])
        channel = int(columns["channels"][recording])
        state = FileState(*(int(columns[name][recording]) for name in ("sizes", "changed", "crc32")))
        return Utterance(
            id=self.id(index),
            path=f"{self.audio}/{self._paths[recording]}",
            start=int(columns["starts"][index]),
            length=int(columns["lengths"][index]),
            rate=int(columns["rates"][recording]),
            channel=None if channel < 0 else channel,
            state=state,
            plain=int(columns["plain"][recording]),
        )

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    def id(self, index: int) -> str:
        return _id(self._paths[self._recordings[index]], int(self._parts[index]))

    def ids(self) -> Strings:
        """The ids of all utterances, made anew."""
        paths = list(self._paths)
        return Strings.of(
            [_id(paths[each], part) for each, part in zip(self._recordings.tolist(), self._parts.tolist())]
        )

    def recording_paths(self) -> Strings:
        """The paths of all recordings, relative to ``audio``."""
        return self._paths

    def recordings(self, indices: np.ndarray) -> np.ndarray:
        """The row of each utterance's recording in `recording_paths`."""
        return self._recordings[indices]

    def sources(self) -> np.ndarray:
        """The source of each utterance's samples: int64 ``[utterances, 2]``, CRC and channel of its recording."""
        each = [self._columns[name][self._recordings].astype(np.int64) for name in ("crc32", "channels")]
        return np.stack(each, axis=1)

    @property
    def has_phones(self) -> np.ndarray:
        """Which utterances have a phone alignment: bool ``[utterances]``."""
        return self._phones.counts > 0

    def phones(self, index: int) -> list[Phone]:
        """The phones of an utterance, times from its start; none where it has no alignment."""
        return self._phones[index]


def load_manifest(directory: Path, split: str) -> Manifest:
    """The utterances of ``split`` ("train" or "valid") of a manifest directory; there may be none.

    Raises:
        FileNotFoundError: there is no such manifest.
    """
    path = manifest_path(directory, split)
    if not path.is_file():
        raise FileNotFoundError(f"directory={str(directory)!r} holds no {path.name}: `hubert-fast scan` makes it")
    return Manifest(path)


def manifest_path(directory: Path, split: str) -> Path:
    return Path(directory) / f"{split}.safetensors"


def write_manifest(
    path: Path,
    audio: Path,
    recordings: Recordings,
    chosen: np.ndarray,  # [recordings] bool
    phones_of: Callable[[str], list[Phone]],
    *,
    longest_seconds: float,
) -> Manifest:
    """Write the manifest of the ``chosen`` recordings, which lie in the folder ``audio``, and return it.

    A recording longer than ``longest_seconds`` becomes several utterances of equal length. ``phones_of`` gives the phone
    alignment of a recording by its path, empty where it has none.
    """
    names = [path for path, wanted in zip(recordings.paths, chosen.tolist(), strict=True) if wanted]
    rates, channels, samples, sizes, changed, crc32, plain = recordings.numbers()[chosen].T
    parts = np.ceil(samples / rates / longest_seconds).astype(np.int64)
    of = np.repeat(np.arange(len(names)), parts)  # the recording of each utterance
    part = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    first, last = samples[of] * part // parts[of], samples[of] * (part + 1) // parts[of]
    bounds = zip((first / rates[of]).tolist(), (last / rates[of]).tolist())
    paths = Strings.of(names)
    columns = {
        "paths": paths.text,
        "path_ends": paths.ends,
        "rates": rates.astype(np.int32),
        "channels": channels.astype(np.int32),
        "sizes": sizes,
        "changed": changed,
        "crc32": crc32.astype(np.uint32),
        "plain": plain.astype(np.uint8),
        "recordings": of.astype(np.int32),
        "parts": np.where(parts[of] == 1, -1, part).astype(np.int32),
        "starts": first,
        "lengths": last - first,
        **PhoneColumns.of(_phones_of_parts(names, parts.tolist(), bounds, phones_of)).columns(),
    }
    write_columns(path, columns, {"audio": str(audio)})
    return Manifest(path)


def _phones_of_parts(
    names: list[str], parts: list[int], bounds: Iterator[tuple[float, float]], phones_of: Callable[[str], list[Phone]]
) -> Iterator[list[Phone]]:
    """The phones of each utterance, given how many each recording has and their first and last seconds."""
    for name, count in zip(names, parts, strict=True):
        phones = phones_of(name)
        for first, last in islice(bounds, count):
            yield [part for phone in phones if (part := phone.within(first, last)) is not None]


def recording_of(utterance: str) -> str:
    """The path of the recording of an utterance, given the utterance's id."""
    return _PART.sub("", utterance)


def _id(path: str, part: int) -> str:
    return path if part < 0 else f"{path}#{part:04d}"
