"""What the user should hear of a scan beside the files that were left out: RUN/manifest/notices.jsonl."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from hubert_fast.pretrain.audio_folder import AudioFolder
from hubert_fast.pretrain.probe import AudioInfo

NOTICES = {
    "repaired": "taken though something was wrong with the file",
    "silent": "taken though no sample reaches one step of 16 bits",
    "constant": "taken though it stays within one step of 16 bits",
    "clipped": "taken though more than one sample in a thousand is at full scale",
}
"""kinds of notices, each with what it means"""


def notices(audio: Path, usable: Mapping[str, AudioInfo]) -> list[dict[str, str]]:
    """A line for each usable file and kind of notice, in the order of the files."""
    lines = []
    for relative, info in usable.items():
        path = str(audio / relative)
        if info.repair:
            lines.append({"path": path, "kind": "repaired", "note": info.repair})
        for kind in ("silent", "constant", "clipped"):
            if getattr(info, kind):
                lines.append({"path": path, "kind": kind, "note": NOTICES[kind]})
    return lines


def notice_counts(lines: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """How many of each kind, 0 included."""
    counts = Counter(line["kind"] for line in lines)
    return {kind: counts[kind] for kind in NOTICES}


def not_looked_into(audio: Path, found: AudioFolder) -> list[dict[str, str]]:
    """A line for each folder and file that the scan could not look into; folders are told on stderr too."""
    for relative, reason in found.closed.items():
        tqdm.write(f"scan: {printable(audio / relative)}: {reason}; what is in it is left out", file=sys.stderr)
    return [
        {"path": printable(audio / relative), "reason": reason}
        for relative, reason in {**found.closed, **found.unread}.items()
    ]


def printable(path: Path) -> str:
    """A path as text, whatever bytes its name has."""
    return str(path).encode(errors="backslashreplace").decode()
