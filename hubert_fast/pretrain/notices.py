"""What the user should hear of a scan beside the files that were left out: RUN/manifest/notices.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hubert_fast.pretrain.audio_folder import AudioFolder
from hubert_fast.pretrain.probe import AudioInfo
from hubert_fast.pretrain.progress import say

NOTICES = {
    "repaired": "taken though something was wrong with the file",
    "silent": "taken though no sample reaches one step of 16 bits",
    "constant": "taken though it stays within one step of 16 bits",
    "clipped": "taken though more than one sample in a thousand is at full scale",
    "alignment": "a phone alignment that belongs to no audio file",
}
"""kinds of notices, each with what it means"""


def notices_of(path: Path, info: AudioInfo) -> list[dict[str, str]]:
    """A line for each kind of notice that a usable file is worth."""
    lines = [{"path": str(path), "kind": "repaired", "note": info.repair}] if info.repair else []
    flags = [kind for kind in ("silent", "constant", "clipped") if getattr(info, kind)]
    return lines + [{"path": str(path), "kind": kind, "note": NOTICES[kind]} for kind in flags]


def unused_alignments(audio: Path, names: Iterable[str]) -> list[dict[str, str]]:
    """A line for each alignment that belongs to no audio file; how many there are is told on stderr too."""
    lines = [{"path": str(audio / name), "kind": "alignment", "note": NOTICES["alignment"]} for name in names]
    if lines:
        first = printable(Path(lines[0]["path"]))
        say(f"warning: phone alignments that belong to no audio file: {len(lines)}, the first is {first}")
    return lines


def notice_counts(lines: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """How many of each kind, 0 included."""
    counts = Counter(line["kind"] for line in lines)
    return {kind: counts[kind] for kind in NOTICES}


def not_looked_into(audio: Path, found: AudioFolder) -> list[dict[str, str]]:
    """A line for each folder and file that the scan could not look into; folders are told on stderr too."""
    for relative, reason in found.closed.items():
        say(f"scan: {printable(audio / relative)}: {reason}; what is in it is left out")
    return [
        {"path": printable(audio / relative), "reason": reason}
        for relative, reason in {**found.closed, **found.unread}.items()
    ]


def printable(path: Path) -> str:
    """A path as text, whatever bytes its name has."""
    return str(path).encode(errors="backslashreplace").decode()
