"""What a file's bytes hold, by their own account: the streams that are decoded, whatever the file's name says it is."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_tags import skip_tags
from hubert_fast.pretrain.byte_view import ByteWindow
from hubert_fast.pretrain.flac_layout import flac_layout, is_flac
from hubert_fast.pretrain.mp3_frames import frame_length
from hubert_fast.pretrain.mp3_layout import mp3_layout
from hubert_fast.pretrain.ogg_layout import OggStream, is_ogg, ogg_layout
from hubert_fast.pretrain.streams import Layout, Stream, foreign
from hubert_fast.pretrain.wav_layout import is_wav, wav_layout

_FORMATS = ((is_wav, wav_layout), (is_flac, flac_layout), (is_ogg, ogg_layout))
PLAIN = (Stream(), OggStream())
"""how a file is read that holds one stream, with nothing wrong about it"""
_MAGIC = re.compile(rb"RIFF|RIFX|RF64|BW64|fLaC|OggS")
_SEARCHED = 1 << 16  # bytes of garbage that may precede a header


def read_layout(path: Path) -> Layout:
    """The streams of a file.

    Raises:
        AudioError: it is cut off or damaged, or cannot be told.
        OSError: it cannot be read.
    """
    state = path.stat()
    return _read_layout(str(path), state.st_size, state.st_mtime_ns)


def plain_kind(layout: Layout) -> int:
    """The number of the reader in `PLAIN` for a file of this layout, counted from 1; 0 where it takes the layout to read it."""
    first = layout.streams[0]
    if len(layout.streams) > 1 or layout.repairs or first.pieces is not None:
        return 0
    return next((number for number, each in enumerate(PLAIN, start=1) if type(each) is type(first)), 0)


# The same file is asked for again and again where a long recording was cut into parts. A layout takes up to a megabyte for
# an hour of MP3, so few are kept.
@lru_cache(maxsize=32)
def _read_layout(path: str, size: int, changed: int) -> Layout:
    with open(path, "rb", buffering=0) as file:
        window = ByteWindow(file, Path(path))
        start = skip_tags(window, 0)
        found = _known_format(window, start)
        return found or _other_format(window) or mp3_layout(window, start)


def _known_format(window: ByteWindow, start: int) -> Layout | None:
    head = window.read(start, _SEARCHED)
    if frame_length(head[:4]):
        return None
    for match in _MAGIC.finditer(head):
        for is_one, layout in _FORMATS:
            if is_one(head[match.start() : match.start() + 12]):
                before = foreign(window.path, match.start(), window.size, "before its audio")
                found = layout(window, start + match.start())
                return Layout(found.streams, before + found.repairs)
    return None


def _other_format(window: ByteWindow) -> Layout | None:
    """The layout of a format that the decoder knows, with what its header promises; None if it is none."""
    head = window.read(0, 1024)
    if head[:7] == b"NIST_1A":
        samples = re.search(rb"sample_count -i (\d+)", head)
        return Layout((Stream(samples=int(samples[1]) if samples else None),))
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        promised = 8 + int.from_bytes(head[4:8], "big")
    elif head[:4] == b"riff" and len(head) >= 24:
        promised = int.from_bytes(head[16:24], "little")
    elif head[:4] == b".snd":
        size = int.from_bytes(head[8:12], "big")
        promised = 0 if size == 0xFFFFFFFF else int.from_bytes(head[4:8], "big") + size
    elif head[:4] == b"caff":
        promised = 0
    else:
        return None
    if promised > window.size:
        raise AudioError(window.path, f"truncated: its header says {promised} bytes, {window.size} are there")
    return Layout((Stream(),))
