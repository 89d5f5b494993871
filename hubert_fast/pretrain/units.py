"""Units: the cluster of every frame of every utterance, which an iteration learns to predict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hubert_fast.pretrain.columns import Columns, NewColumns, Strings, new_columns
from hubert_fast.pretrain.frames import num_frames
from hubert_fast.pretrain.manifest import Manifest


class Units:
    """The units of a split, ``units/<split>.safetensors`` (see `columns`), by the place of the utterance in the split.

    It is the list of the utterances to train on, too, which a later manifest does not change. They are read from disk when
    they are asked for: workers share the pages of one mapped file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
        DamagedFileError: it is cut short.
    """

    def __init__(self, path: Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there are no units at {str(path)!r}: `hubert-fast units` makes them")
        self._columns = Columns(path)
        metadata = self._columns.metadata
        for name in ("num_classes", "manifest_sha256"):
            if name not in metadata:
                raise ValueError(
                    f"path={str(path)!r} is no file of units of this version: it lacks the metadata {name}"
                )
        self.num_classes = int(metadata["num_classes"])
        self.manifest_sha256 = metadata["manifest_sha256"]
        self.ids = Strings(self._columns["ids"], self._columns["id_ends"])
        self.samples: np.ndarray = self._columns["samples"]
        """int64 ``[utterances]``, at 16 kHz"""
        self._ends = np.cumsum(num_frames(self.samples))

    def __reduce__(self) -> tuple[type[Units], tuple[Path]]:
        return Units, (self._columns.path,)  # memory maps would be sent as the numbers in them

    @property
    def sha256(self) -> str:
        """The hash of the file; `verify` says whether it is still right."""
        return self._columns.sha256

    @property
    def known(self) -> np.ndarray:
        """Which utterances have units, bool ``[utterances]``: not those whose audio could not be read."""
        return self._columns["known"].astype(bool)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> np.ndarray:
        """int16 or int32 ``[frames]`` of an utterance; of no meaning where it is not `known`."""
        first = self._ends[index - 1] if index else 0
        return self._columns["units"][first : self._ends[index]]

    def verify(self) -> None:
        """Read the whole file; DamagedFileError where it is not what was written."""
        self._columns.verify()

    def places_in(self, manifest: Manifest) -> np.ndarray:
        """The place of each utterance in ``manifest``, int64 ``[utterances]``; -1 where it is not there, or of other audio."""
        if manifest.sha256 == self.manifest_sha256:
            return np.arange(len(self))
        there = {name: place for place, name in enumerate(manifest.ids())}
        places = np.array([there.get(name, -1) for name in self.ids], dtype=np.int64)
        if not len(manifest):
            return places
        same = (manifest.sources()[places] == self._columns["sources"].reshape(-1, 2)).all(axis=1)
        return np.where(same & (manifest.samples[places] == self.samples), places, -1)


@contextmanager
def new_units(path: Path, manifest: Manifest, num_classes: int) -> Iterator[UnitsToFill]:
    """The units of all utterances of ``manifest``, to be filled in any order; the file is there once the block ends well."""
    ids, frames = manifest.ids(), num_frames(manifest.samples)
    dtype = np.int16 if num_classes <= np.iinfo(np.int16).max else np.int32
    columns = {
        "ids": (np.uint8, len(ids.text)),
        "id_ends": (np.int64, len(ids)),
        "samples": (np.int64, len(ids)),
        "sources": (np.int64, 2 * len(ids)),
        "known": (np.uint8, len(ids)),
        "units": (dtype, int(frames.sum())),
    }
    metadata = {"num_classes": str(num_classes), "manifest_sha256": manifest.sha256}
    with new_columns(path, columns, metadata) as file:
        made_of = {
            "ids": ids.text,
            "id_ends": ids.ends,
            "samples": manifest.samples,
            "sources": manifest.sources().ravel(),
        }
        for name, values in made_of.items():
            file.put(name, values)
        units = UnitsToFill(file, np.cumsum(frames), num_classes)
        yield units
        file.put("known", units.known)


class UnitsToFill:
    """A file of units while it is made."""

    def __init__(self, file: NewColumns, ends: np.ndarray, num_classes: int) -> None:
        self._file, self._ends = file, ends
        self.known = np.zeros(len(ends), dtype=bool)
        """bool ``[utterances]``: which have units so far"""
        self.counts = np.zeros(num_classes, dtype=np.int64)
        """int64 ``[num_classes]``: frames of each unit so far"""

    def put(self, index: int, units: np.ndarray) -> None:
        """Write the units of one utterance, int ``[frames]``."""
        self._file.put("units", units, int(self._ends[index]) - len(units))
        self.known[index] = True
        self.counts += np.bincount(units, minlength=len(self.counts))
