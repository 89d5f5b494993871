"""Phone alignments that lie beside the audio, as lhotse supervisions.

Two formats are read: ``alignments.jsonl`` at the top of the folder, one utterance a line
(``{"path": "a/b.wav", "phones": [["AH", start, duration], ...], "voice": ..., "language": ..., "text": ...}``, all but
the first two optional), and ``<stem>.phones.tsv`` beside an audio file, one phone a line (symbol, start, duration,
separated by tabs). Times are in seconds from the start of the file. The tsv wins where an utterance has both.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lhotse.supervision import AlignmentItem, SupervisionSegment

from hubert_fast.pretrain.run_summary import parsed_lines

ALIGNMENTS_FILE = "alignments.jsonl"
_TSV_SUFFIX = ".phones.tsv"


class Alignments:
    """The alignments of the audio below a folder, by the path of the audio file relative to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed = _read_listed(folder / ALIGNMENTS_FILE)

    def supervision(self, relative: str, *, cut_id: str, start: float, duration: float) -> SupervisionSegment | None:
        """What is known of ``[start, start + duration)`` seconds of a file, its times counted from ``start``; None if
        nothing.
        """
        entry = self._listed.get(relative, {})
        tsv = (self._folder / relative).with_suffix(_TSV_SUFFIX)
        phones = _read_tsv(tsv) if tsv.is_file() else entry.get("phones", [])
        if not phones and not entry:
            return None
        return SupervisionSegment(
            id=cut_id,
            recording_id=relative,
            start=0.0,
            duration=duration,
            text=entry.get("text"),
            language=entry.get("language"),
            speaker=entry.get("voice"),
            alignment={"phone": _within(phones, start, duration)} if phones else None,
        )


def _within(phones: list[AlignmentItem], start: float, duration: float) -> list[AlignmentItem]:
    inside = []
    for phone in phones:
        first, last = max(phone.start, start), min(phone.end, start + duration)
        if last > first:
            inside.append(AlignmentItem(phone.symbol, first - start, last - first))
    return inside


def _read_listed(path: Path) -> dict[str, dict[str, Any]]:
    def entry(line: str) -> tuple[str, dict[str, Any]]:
        values = json.loads(line)
        return values["path"], {**values, "phones": [_item(*phone) for phone in values.get("phones", [])]}

    expected = '{"path": ..., "phones": [[symbol, start, duration], ...]}, times in seconds'
    return dict(parsed_lines(path, entry, expected)) if path.is_file() else {}


def _read_tsv(path: Path) -> list[AlignmentItem]:
    expected = "symbol, start and duration in seconds, separated by tabs"
    return list(parsed_lines(path, lambda line: _item(*line.split("\t")), expected))


def _item(symbol: str, start: float | str, duration: float | str) -> AlignmentItem:
    start, duration = float(start), float(duration)
    if not (math.isfinite(start) and math.isfinite(duration)) or start < 0 or duration < 0:
        raise ValueError(f"phone {symbol!r} starts at {start} and lasts {duration} seconds; neither may be negative")
    return AlignmentItem(str(symbol), start, duration)
