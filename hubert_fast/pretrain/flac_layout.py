"""The audio of a FLAC file, where its header may not say how many samples there are, or say it wrongly.

Each frame carries its number and two checksums, so the last whole frame tells where the stream ends. A header with 0
samples is allowed and usual of pipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_tags import skip_tags
from hubert_fast.pretrain.byte_view import ByteWindow
from hubert_fast.pretrain.streams import TRIFLE_SECONDS, Layout, SequentialFile, Stream

_MAGIC = b"fLaC"
_INFO_BLOCK = b"\x00\x00\x00\x22"  # STREAMINFO, 34 bytes; it always comes first
_LAST_INFO_BLOCK = b"\x80\x00\x00\x22"
_HEADER = 4 + 4 + 34
_TAIL = 1 << 18
_MOST_CANDIDATES = 64  # from the end; the last whole frame is among the last few
_BLOCK_SIZES = {
    1: 192,
    **{code: 576 << code - 2 for code in range(2, 6)},
    **{code: 256 << code - 8 for code in range(8, 16)},
}


@dataclass(frozen=True)
class _Info:
    """STREAMINFO, as far as it matters here."""

    block_size: int
    rate: int
    samples: int


@dataclass(frozen=True)
class _Frame:
    """A frame's first sample and number of samples, per channel."""

    first: int
    samples: int


@dataclass(frozen=True)
class _CutOutStream(Stream):
    """A stream whose frames are not numbered from 0: the decoder would seek by their numbers and miss."""

    def open_at(self, path: str, start: int) -> tuple[SequentialFile, int]:
        return self.open(path), start


def is_flac(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a FLAC."""
    return head[:4] == _MAGIC


def flac_layout(window: ByteWindow, start: int) -> Layout:
    """The streams of a FLAC file that begins at byte ``start``.

    Raises:
        AudioError: it is cut off.
    """
    starts = _starts(window, start)
    streams: list[Stream] = []
    repairs: list[str] = []
    for begin, stop in zip(starts, [*starts[1:], window.size], strict=True):
        stream, repair = _stream(window, begin, stop, alone=start == 0 and len(starts) == 1)
        streams.append(stream)
        repairs += repair
    if len(streams) > 1:
        repairs.append(f"{len(streams)} FLAC streams that were joined")
    return Layout(tuple(streams), tuple(repairs))


def _starts(window: ByteWindow, start: int) -> list[int]:
    starts = [start]
    position = start + _HEADER
    while (position := window.find(_MAGIC, position)) >= 0:
        if window.read(position + 4, 4) in (_INFO_BLOCK, _LAST_INFO_BLOCK):
            starts.append(position)
        position += 4
    return starts


def _stream(window: ByteWindow, start: int, stop: int, *, alone: bool) -> tuple[Stream, list[str]]:
    info = _read_info(window, start)
    whole = Stream(None if alone else ((start, stop),), info.samples or None)
    found = _last_frame(window, start, stop, info)
    if found is None:
        if info.samples == 0:
            raise AudioError(window.path, "damaged: its header does not say how long it is, and it has no whole frame")
        return whole, []
    end, last = found
    first = _first_frame(window, start, info)
    offset = first.first if first is not None else 0
    samples = last.first + last.samples - offset
    if info.samples and offset == 0 and info.samples in (samples, samples + _whole_frame(window, end, stop, info)):
        return whole, []
    missing = info.samples - samples
    if missing > TRIFLE_SECONDS * info.rate:
        raise AudioError(window.path, f"truncated: its header says {info.samples} samples, {samples} are there")
    says = f"says {info.samples} samples, {samples} are there" if info.samples else "does not say how long it is"
    kind = Stream if offset == 0 else _CutOutStream
    return kind((_patched(window, start, samples), (start + _HEADER, end)), samples), [f"its header {says}"]


def _whole_frame(window: ByteWindow, start: int, stop: int, info: _Info) -> int:
    """Samples of the frame at ``start``, of which only the decoder can tell whether it is whole; 0 if there is none."""
    frame = _read_frame(window.read(start, 16), info) if start < stop else None
    return 0 if frame is None else frame.samples


def _read_info(window: ByteWindow, start: int) -> _Info:
    header = window.read(start, _HEADER)
    if len(header) < _HEADER or header[4:8] not in (_INFO_BLOCK, _LAST_INFO_BLOCK):
        raise AudioError(window.path, "unreadable: its FLAC header is damaged")
    smallest, largest = (int.from_bytes(header[at : at + 2], "big") for at in (8, 10))
    packed = int.from_bytes(header[18:26], "big")
    return _Info(largest if smallest == largest else 0, packed >> 44, packed & (1 << 36) - 1)


def _patched(window: ByteWindow, start: int, samples: int) -> bytes:
    header = bytearray(window.read(start, _HEADER))
    packed = int.from_bytes(header[18:26], "big")
    header[18:26] = (packed >> 36 << 36 | samples).to_bytes(8, "big")
    header[26:42] = bytes(16)  # the MD5 of the samples: unknown
    return bytes(header)


def _first_frame(window: ByteWindow, start: int, info: _Info) -> _Frame | None:
    position, last = start + 4, False
    while not last:
        block = window.read(position, 4)
        if len(block) < 4:
            return None
        last = bool(block[0] & 0x80)
        position += 4 + int.from_bytes(block[1:], "big")
    return _read_frame(window.read(position, 16), info)


def _last_frame(window: ByteWindow, start: int, stop: int, info: _Info) -> tuple[int, _Frame] | None:
    """Where the last whole frame ends, and that frame; None where none is found near the end."""
    origin = max(start + _HEADER, stop - _TAIL)
    tail = window.read(origin, stop - origin)
    candidates = list(_candidates(tail, info))[-_MOST_CANDIDATES:]
    # Zeros may fill the file up, and may belong to the last frame's checksum.
    filled = len(tail.rstrip(b"\0"))
    ends = [len(tail), *range(filled, min(filled + 3, len(tail))), *(position for position, _ in reversed(candidates))]
    tag = tail.rfind(b"TAG")
    if tag >= 0 and skip_tags(window, origin + tag) == stop:
        ends.insert(1, tag)
    for end in ends:
        for position, frame in reversed(candidates):
            if position < end and _crc16(tail[position:end]) == 0:
                return origin + end, frame
    return None


def _candidates(tail: bytes, info: _Info):
    position = -1
    while (position := tail.find(b"\xff", position + 1)) >= 0:
        if tail[position + 1 : position + 2] in (b"\xf8", b"\xf9"):
            frame = _read_frame(tail[position : position + 16], info)
            if frame is not None:
                yield position, frame


def _read_frame(head: bytes, info: _Info) -> _Frame | None:
    """The frame that begins with ``head``, 16 bytes; None if none does."""
    if len(head) < 16 or head[0] != 0xFF or head[1] & 0xFE != 0xF8:
        return None
    size_code, rate_code = head[2] >> 4, head[2] & 15
    number = _coded_number(head[4:11])
    if size_code == 0 or rate_code == 15 or number is None:
        return None
    value, length = number
    position = 4 + length
    if size_code in (6, 7):
        size = int.from_bytes(head[position : position + size_code - 5], "big") + 1
        position += size_code - 5
    else:
        size = _BLOCK_SIZES[size_code]
    position += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if position >= len(head) or _crc8(head[: position + 1]) != 0:
        return None
    return _Frame(value if head[1] & 1 else value * (info.block_size or size), size)


def _coded_number(data: bytes) -> tuple[int, int] | None:
    """A number in the coding of UTF-8, up to 36 bits, and its length in bytes."""
    first = data[0]
    if first < 0x80:
        return first, 1
    length = 8 - (first ^ 0xFF).bit_length()
    if not 2 <= length <= 7 or any(byte & 0xC0 != 0x80 for byte in data[1:length]):
        return None
    value = first & (1 << 7 - length) - 1 if length < 7 else 0
    for byte in data[1:length]:
        value = value << 6 | byte & 0x3F
    return value, length


def _table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table


_CRC8 = _table(0x07, 8)
_CRC16 = _table(0x8005, 16)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _crc16(data: bytes) -> int:
    """0 for a frame that ends with its checksum."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFF00) ^ _CRC16[value >> 8 ^ byte]
    return value
