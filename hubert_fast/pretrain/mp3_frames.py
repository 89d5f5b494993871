"""The frames of an MP3 stream (MPEG 1, 2 and 2.5, layer III): their lengths, and frames made up to lead a decoder in."""

from __future__ import annotations

import struct
from collections.abc import Iterable

_KILOBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2 and 2.5
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_ROOMY = 9 << 4  # a bit rate whose frames hold a Xing header
HEADER = 4
LENGTH_TAGS = (b"Xing", b"Info")
"""what marks a frame that holds no audio but the number of frames"""


def _version(second: int) -> int:
    return second >> 3 & 3


def _lengths() -> dict[int, int]:
    """Bytes of a frame by the second and third byte of its header; headers that are no layer III frame are absent."""
    lengths = {}
    for second in range(0xE0, 0x100):
        version = _version(second)
        if version == 1 or second >> 1 & 3 != 1:
            continue
        for index in range(1, 15):
            for rate_index, rate in enumerate(_RATES[version]):
                kilobits = _KILOBITS[3 if version == 3 else 2][index]
                for padding in (0, 1):
                    third = index << 4 | rate_index << 2 | padding << 1
                    length = (144_000 if version == 3 else 72_000) * kilobits // rate + padding
                    lengths[second << 8 | third] = lengths[second << 8 | third | 1] = length
    return lengths


_LENGTHS = _lengths()


def frame_length(header: bytes) -> int:
    """Bytes of the frame that begins with ``header``, 4 bytes; 0 if none does."""
    if len(header) < HEADER or header[0] != 0xFF or header[3] & 3 == 2:
        return 0
    return _LENGTHS.get(header[1] << 8 | header[2], 0)


def kind(header: bytes) -> tuple[int, int, bool]:
    """What all frames of a stream have in common: version and layer, sampling rate, whether they are mono."""
    return header[1] & 0xFE, header[2] & 0x0C, header[3] >> 6 == 3


def sampling_rate(header: bytes) -> int:
    """Hz."""
    return _RATES[_version(header[1])][header[2] >> 2 & 3]


def frame_samples(header: bytes) -> int:
    """Samples of a frame, per channel."""
    return 1152 if _version(header[1]) == 3 else 576


def _side_length(header: bytes) -> int:
    mono = header[3] >> 6 == 3
    if _version(header[1]) == 3:
        return 17 if mono else 32
    return 9 if mono else 17


def tag_offset(header: bytes) -> int:
    """Where in a frame its Xing header is."""
    return HEADER + _side_length(header)


def silent_frame(header: bytes) -> bytes:
    """A frame of the kind of ``header`` that decodes to silence."""
    bare = bytes([0xFF, header[1] | 1, _ROOMY | header[2] & 0x0C, header[3] & 0xCC])
    return bare + bytes(frame_length(bare) - HEADER)


def xing_frame(header: bytes, frames: int) -> bytes:
    """A frame that says how many follow."""
    frame = bytearray(silent_frame(header))
    struct.pack_into(">4sII", frame, tag_offset(header), LENGTH_TAGS[0], 1, frames)
    return bytes(frame)


def without_missing_reservoir(frames: Iterable[bytes]) -> bytes:
    """A stretch of whole frames in which those are silent that need data from frames before the first.

    A frame may take up to 511 bytes of its data from the frames before it, and leaves its own to those behind: it keeps them.
    """
    reservoir = 0
    mended = []
    for frame in frames:
        mpeg1 = _version(frame[1]) == 3
        side, length = HEADER + (0 if frame[1] & 1 else 2), _side_length(frame)
        field = int.from_bytes(frame[side : side + 2], "big")
        shift = 7 if mpeg1 else 8  # the field that says how far back its data begins has 9 bits, or 8
        if field >> shift > reservoir:
            silent = (reservoir << shift).to_bytes(2, "big") + bytes(length - 2)
            frame = frame[:side] + silent + frame[side + length :]
        mended.append(frame)
        reservoir += len(frame) - side - length
    return b"".join(mended)
