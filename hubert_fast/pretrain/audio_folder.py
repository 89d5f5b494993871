"""The audio files below a folder, and all that is there and cannot be looked into."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from hubert_fast.pretrain.alignments import TSV_SUFFIX

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
OTHER_SUFFIXES = (
    *(".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".dss", ".m4a", ".m4b", ".mka", ".mp2"),
    *(".mp4", ".mpga", ".ra", ".shn", ".snd", ".sph", ".spx", ".tta", ".voc", ".w64", ".weba", ".webm", ".wma", ".wv"),
)
"""names of audio that the scan does not read: it says so of each, or such a corpus would shrink without a word"""


@dataclass
class AudioFolder:
    """The audio in a folder, and what else is there. Links to folders are followed, each once; hidden names are not looked at."""

    files: list[str] = field(default_factory=list)
    """audio files, as sorted paths relative to the folder"""
    alignments: list[str] = field(default_factory=list)
    """phone alignments beside audio, as paths relative to the folder"""
    closed: dict[str, str] = field(default_factory=dict)
    """folders that cannot be entered, and the reason, by path relative to the folder"""
    unread: dict[str, str] = field(default_factory=dict)
    """audio of other formats and links that lead nowhere, and the reason, by path relative to the folder"""


def find_audio(folder: Path) -> AudioFolder:
    """Find the audio below ``folder``.

    Raises:
        ValueError: ``folder`` is no folder, cannot be read, or holds no audio.
    """
    if not folder.is_dir():
        raise ValueError(f"audio={str(folder)!r} is not a folder")
    found = AudioFolder()

    def note(error: OSError) -> None:
        relative = os.path.relpath(error.filename, folder)
        if relative == ".":
            raise ValueError(f"audio={str(folder)!r} cannot be read: {error.strerror}") from error
        found.closed[relative] = f"the folder cannot be entered ({error.strerror})"

    seen = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=note):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = "" if directory == str(folder) else os.path.relpath(directory, folder)
        for name in names:
            if not name.startswith("."):
                _sort_in(found, os.path.join(directory, name), os.path.join(inside, name))
    found.files.sort()
    if not found.files:
        others = "".join(f"; {path}: {reason}" for path, reason in list({**found.closed, **found.unread}.items())[:1])
        raise ValueError(
            f"audio={str(folder)!r} holds no audio: files ending in {', '.join(AUDIO_SUFFIXES)} are accepted{others}"
        )
    return found


def _sort_in(found: AudioFolder, path: str, relative: str) -> None:
    suffix = os.path.splitext(relative)[1].lower()
    if suffix in AUDIO_SUFFIXES:
        found.files.append(relative)
    elif relative.endswith(TSV_SUFFIX):
        found.alignments.append(relative)
    elif suffix in OTHER_SUFFIXES:
        found.unread[relative] = f"files ending in {suffix} are not read: convert it to FLAC"
    elif os.path.islink(path) and not os.path.exists(path):
        found.unread[relative] = "a link that leads nowhere, or where nobody may look"
