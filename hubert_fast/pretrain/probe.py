"""Decode a file once, from end to end, to learn what it really holds: headers of cut-off files lie.

What tells a truncated file: FLAC fails to decode; MP3 decodes fewer samples than its Xing header promises (an MP3
without one says nothing of its length); WAV's data chunk reaches beyond the end of the file; Ogg's last page is not
marked as the last.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from hubert_fast.pretrain.audio import AudioError

_BLOCK_SAMPLES = 1 << 20
_LARGEST_LENGTH = 1 << 62
_LARGEST_OGG_PAGE = 65_307
_OGG_HEADER = 27
_OGG_LAST_PAGE = 4
# Programs that write a WAV into a pipe cannot know its length and put such a size into the header.
_UNKNOWN_CHUNK_SIZES = range(0x7FFF0000, 0x100000000)


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds once decoded; ``samples`` per channel, ``rate`` in Hz."""

    rate: int
    channels: int
    samples: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def probe(path: Path) -> AudioInfo:
    """Decode ``path`` whole.

    Raises:
        AudioError: it is empty, unreadable or truncated, or holds a NaN or an infinity.
    """
    try:
        if path.stat().st_size == 0:
            raise AudioError(str(path), "the file is empty (0 bytes)")
        with soundfile.SoundFile(path) as file:
            promised = file.frames
            if promised > _LARGEST_LENGTH:
                raise AudioError(
                    str(path), "its header does not say how long it is (written into a pipe?): encode it anew"
                )
            guessed = file.format == "MP3" and not _mp3_says_its_length(path)
            decoded = _decode(file, path)
            info = AudioInfo(rate=file.samplerate, channels=file.channels, samples=decoded)
        ending = _missing_end(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(str(path), f"unreadable ({error})") from error
    if ending is None and decoded < promised and not guessed:
        ending = f"its header says {promised} samples, {decoded} can be decoded"
    if ending is not None:
        raise AudioError(str(path), f"truncated: {ending}")
    if decoded == 0:
        raise AudioError(str(path), "zero-length: it holds no samples")
    return info


def _decode(file: soundfile.SoundFile, path: Path) -> int:
    samples = 0
    while True:
        try:
            block = file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise AudioError(
                str(path), f"truncated or damaged: decoding fails after sample {samples} ({error})"
            ) from error
        if not len(block):
            return samples
        if not np.isfinite(block).all():
            raise AudioError(str(path), "it holds a NaN or an infinity")
        samples += len(block)


def _mp3_says_its_length(path: Path) -> bool:
    """Whether the first frame after the ID3 tag is of the kinds that hold the length; else libsndfile estimates it."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        frame = file.read(256)
    return any(kind in frame for kind in (b"Xing", b"Info", b"VBRI"))


def _missing_end(path: Path) -> str | None:
    """What is missing at the end of a WAV or Ogg file, which libsndfile does not say; None where nothing is."""
    with open(path, "rb") as file:
        magic = file.read(12)
        size = path.stat().st_size
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            return _missing_wav_data(file, size)
        if magic[:4] == b"OggS":
            return _missing_ogg_page(file, size)
    return None


def _missing_wav_data(file, size: int) -> str | None:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        position += 8 + length + length % 2
        if name == b"data":
            available = size - file.tell()
            if length <= available or length in _UNKNOWN_CHUNK_SIZES:
                return None
            return f"its header says {length} bytes of audio, {available} are there"
    return None


def _missing_ogg_page(file, size: int) -> str | None:
    file.seek(max(0, size - 2 * _LARGEST_OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) >= _OGG_HEADER and page[5] & _OGG_LAST_PAGE:
        segments = page[26]
        whole = _OGG_HEADER + segments + sum(page[_OGG_HEADER : _OGG_HEADER + segments])
        if len(page) >= whole:
            return None
    return "its last Ogg page is not marked as the end of the stream"
