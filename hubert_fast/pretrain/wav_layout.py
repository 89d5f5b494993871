"""The audio of a WAV file (RIFF, RIFX, RF64), where its header's sizes may be wrong.

A size that was never filled in is a placeholder: 0 with no chunk behind it, or about the largest that fits. The audio then
reaches to the end of the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_tags import skip_tags
from hubert_fast.pretrain.byte_view import ByteWindow
from hubert_fast.pretrain.streams import TRIFLE_SECONDS, Layout, Stream, foreign_behind

_RIFF = (b"RIFF", b"RIFX", b"RF64", b"BW64")
_PLACEHOLDERS = (range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 0x100000000))
_LARGEST_CHUNK = 0xFFFFFFFF
_DIRECT_TAGS = (1, 3, 6, 7)  # PCM, float, A-law, mu-law: bytes tell the number of samples
_EXTENSIBLE = 0xFFFE


@dataclass
class _Riff:
    """One RIFF form: positions in bytes of the file."""

    start: int
    order: str
    data: int = 0
    promised: int = 0
    contradicts: bool = False
    """whether two sizes are given that differ, of which the longer field counts"""
    bytes_per_second: int = 0
    block: int = 0
    """bytes of a sample of all channels; 0 where the header does not tell them"""


def is_wav(head: bytes) -> bool:
    """Whether a file that begins with ``head``, 12 bytes, is a WAV."""
    return head[:4] in _RIFF and head[8:12] == b"WAVE"


def wav_layout(window: ByteWindow, start: int) -> Layout:
    """The streams of a WAV file that begins at byte ``start``.

    Raises:
        AudioError: it is cut off, or holds more than can be told apart.
    """
    streams: list[Stream] = []
    repairs: list[str] = []
    while True:
        riff = _read_header(window, start)
        stop, behind, repair = _extent(window, riff)
        if riff.contradicts:
            repair = [*repair, f"its two sizes differ, of which {riff.promised} bytes is taken"]
        repairs += repair
        mended = bool(repair) or start > 0
        behind = skip_tags(window, behind)
        joined = is_wav(window.read(behind, 12))
        pieces = _mended(window, riff, stop) if mended or joined or streams else None
        samples = (stop - riff.data) // riff.block if riff.block else None
        streams.append(Stream(pieces, samples))
        if not joined:
            break
        start = behind
    repairs += foreign_behind(window, behind)
    if len(streams) > 1:
        repairs.append(f"{len(streams)} WAV files that were joined")
    return Layout(tuple(streams), tuple(repairs))


def _read_header(window: ByteWindow, start: int) -> _Riff:
    riff = _Riff(start, ">" if window.read(start, 4) == b"RIFX" else "<")
    long_size = None
    position = start + 12
    while position + 8 <= window.size:
        name, size = struct.unpack(riff.order + "4sI", window.read(position, 8))
        body = position + 8
        if name == b"ds64":
            long_size = int.from_bytes(window.read(body + 8, 8), "little")
        elif name == b"fmt " and size >= 16:
            _read_format(riff, window.read(body, min(size, 40)))
        elif name == b"data":
            riff.data = body
            riff.promised = long_size or size
            riff.contradicts = size not in (riff.promised, _LARGEST_CHUNK)
            return riff
        position = body + size + size % 2
    raise AudioError(window.path, "unreadable: it is a WAV without a data chunk, or its header is cut off")


def _read_format(riff: _Riff, body: bytes) -> None:
    if len(body) < 16:
        return
    tag, channels, rate, riff.bytes_per_second, block, bits = struct.unpack(riff.order + "HHIIHH", body[:16])
    if tag == _EXTENSIBLE and len(body) >= 26:
        (tag,) = struct.unpack(riff.order + "H", body[24:26])
    # Where they disagree the decoder must know.
    if tag in _DIRECT_TAGS and block == channels * ((bits + 7) // 8):
        riff.block, riff.bytes_per_second = block, rate * block


def _extent(window: ByteWindow, riff: _Riff) -> tuple[int, int, list[str]]:
    """Where the audio ends, where what follows it begins, and what was wrong with the header."""
    available = window.size - riff.data
    if riff.promised <= available:
        stop = riff.data + riff.promised
        behind = _behind_chunks(window, riff, stop)
        if riff.promised > 0 or behind == window.size or is_wav(window.read(behind, 12)):
            return stop, behind, _overflow(window, riff, behind)
        return window.size, window.size, ["its header says 0 bytes of audio"]
    if any(riff.promised in sizes for sizes in _PLACEHOLDERS) or riff.promised >= 1 << 62:
        return window.size, window.size, ["its header does not say how long it is"]
    missing = riff.promised - available
    if missing > TRIFLE_SECONDS * riff.bytes_per_second:
        raise AudioError(
            window.path, f"truncated: its header says {riff.promised} bytes of audio, {available} are there"
        )
    return window.size, window.size, [f"its header says {riff.promised} bytes of audio, {available} are there"]


def _overflow(window: ByteWindow, riff: _Riff, behind: int) -> list[str]:
    """Refuse a file beyond 4 GiB whose 32 bits of size hold the rest of a division by that."""
    if window.size - behind >= 1 << 32:
        raise AudioError(
            window.path,
            f"its header says {riff.promised} bytes of audio, too few for its {window.size}: it is beyond what a WAV can "
            "hold; convert it to FLAC or RF64",
        )
    return []


def _behind_chunks(window: ByteWindow, riff: _Riff, stop: int) -> int:
    """Where the chunks that follow the audio end; some programs leave out the byte that fills an odd one."""
    padded = stop + (stop - riff.data) % 2
    ends = [_chunks_end(window, riff, position) for position in (padded, stop) if position <= window.size]
    return max(ends, key=lambda end: (end == window.size or is_wav(window.read(end, 12)), end))


def _chunks_end(window: ByteWindow, riff: _Riff, position: int) -> int:
    while position + 8 <= window.size:
        name, size = struct.unpack(riff.order + "4sI", window.read(position, 8))
        if name in _RIFF or not all(0x20 <= byte < 0x7F for byte in name) or position + 8 + size > window.size:
            break
        if name == b"data":
            raise AudioError(window.path, "it has several data chunks, of which only the first would be decoded")
        position = min(position + 8 + size + size % 2, window.size)
    return position


def _mended(window: ByteWindow, riff: _Riff, stop: int) -> tuple[bytes | tuple[int, int], ...]:
    """The header with sizes that are right, and the audio."""
    header = bytearray(window.read(riff.start, riff.data - riff.start))
    size = stop - riff.data
    if header[:4] in (b"RIFF", b"RIFX"):
        struct.pack_into(riff.order + "I", header, 4, min(len(header) - 8 + size, _LARGEST_CHUNK))
        struct.pack_into(riff.order + "I", header, len(header) - 4, min(size, _LARGEST_CHUNK))
    else:
        struct.pack_into("<I", header, len(header) - 4, _LARGEST_CHUNK)
        position = header.find(b"ds64") + 8
        if position < 8 or len(header) < position + 16:
            raise AudioError(window.path, "unreadable: it is an RF64 without its 64 bits of size")
        struct.pack_into("<QQ", header, position, len(header) - 8 + size, size)
    return bytes(header), (riff.data, stop)
