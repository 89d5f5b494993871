"""Phone alignments that lie beside the audio.

Two formats are read: ``alignments.jsonl`` at the top of the folder, one file a line
(``{"path": "a/b.wav", "phones": [["AH", start, duration], ...]}``, other keys are allowed), and ``<stem>.phones.tsv`` or
``<file>.phones.tsv`` beside an audio file, one phone a line (symbol, start, duration, separated by tabs). Times are in
seconds from the start of the file. The tsv wins where a file has both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from hubert_fast.pretrain.phones import Phone
from hubert_fast.pretrain.run_summary import parsed_lines

ALIGNMENTS_FILE = "alignments.jsonl"
TSV_SUFFIX = ".phones.tsv"


class Alignments:
    """The phone alignments of the audio below a folder, by the path of the audio file relative to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed = _read_listed(folder / ALIGNMENTS_FILE)

    def phones(self, relative: str) -> list[Phone]:
        """The phones of a file, times from its start; none where it has no alignment."""
        for name in alignment_names(relative):
            if (self._folder / name).is_file():
                return _read_tsv(self._folder / name)
        return self._listed.get(relative, [])

    def check(self, beside: Iterable[str]) -> None:
        """Read the alignments at the paths ``beside`` audio; ValueError names a line that is malformed."""
        for name in beside:
            _read_tsv(self._folder / name)

    def unused(self, beside: Collection[str], files: Iterable[str]) -> list[str]:
        """The alignments that belong to none of ``files``: of the paths ``beside`` audio, and of the list."""
        if not beside and not self._listed:
            return []
        known = set(files)
        names = {each for file in known for each in alignment_names(file)} if beside else set()
        return sorted(set(beside) - names) + [
            f"{ALIGNMENTS_FILE}: {path}" for path in self._listed if path not in known
        ]


def alignment_names(relative: str) -> tuple[str, str]:
    """The names, relative to the folder, under which a file's alignment may lie beside it."""
    audio = PurePosixPath(relative)
    return str(audio.with_suffix(TSV_SUFFIX)), relative + TSV_SUFFIX


def _read_listed(path: Path) -> dict[str, list[Phone]]:
    def entry(line: str) -> tuple[str, list[Phone]]:
        values = json.loads(line)
        return values["path"], [_phone(*phone) for phone in values.get("phones", [])]

    expected = '{"path": ..., "phones": [[symbol, start, duration], ...]}, times in seconds'
    return dict(parsed_lines(path, entry, expected)) if path.is_file() else {}


def _read_tsv(path: Path) -> list[Phone]:
    expected = "symbol, start and duration in seconds, separated by tabs"
    return list(parsed_lines(path, lambda line: _phone(*line.split("\t")), expected))


def _phone(symbol: str, start: float | str, duration: float | str) -> Phone:
    start, duration = float(start), float(duration)
    if not (math.isfinite(start) and math.isfinite(duration)) or start < 0 or duration < 0:
        raise ValueError(f"phone {symbol!r} starts at {start} and lasts {duration} seconds; neither may be negative")
    return Phone(str(symbol), start, duration)
