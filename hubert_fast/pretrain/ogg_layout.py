"""The audio of an Ogg file (Vorbis, Opus, FLAC): its pages, sorted into the streams that they belong to.

Streams follow one another where files were joined, and lie side by side where there are pictures or titles too; the decoder
knows the first alone. Every page carries a checksum: a stream with a damaged or missing page is refused, because the decoder
passes over it without a word.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_tags import skip_tags
from hubert_fast.pretrain.byte_view import ByteWindow, Piece
from hubert_fast.pretrain.streams import Layout, SequentialFile, Stream, foreign, foreign_behind

_MAGIC = b"OggS"
_HEADER = 27
_FIRST_PAGE, _LAST_PAGE = 2, 4
_CODECS = {b"\x01vorbis": "Vorbis", b"OpusHead": "Opus", b"\x7fFLAC": "FLAC", b"Speex   ": "Speex"}
_LEAD_SECONDS = 5

# Ogg's checksum is zlib's with the bits of every byte, and of the result, in the other order.
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class _Page:
    start: int
    stop: int
    flags: int
    granule: int
    serial: int
    number: int


@dataclass
class _Logical:
    """A stream of one serial number."""

    codec: str | None
    pieces: list[tuple[int, int]] = field(default_factory=list)
    number: int = -1
    granule: int = 0
    ended: bool = False
    last_page: int = 0
    """where it begins"""


@dataclass(frozen=True)
class OggStream(Stream):
    """A stream that is read from somewhat before its start: what a packet decodes to depends on those before it.

    Measured in the tests: Vorbis gives the samples of decoding from the beginning after one packet, Opus after seconds.
    """

    def open_at(self, path: str, start: int) -> tuple[SequentialFile, int]:
        file = self.open(path)
        lead = min(start, _LEAD_SECONDS * file.samplerate)
        if start > lead:
            file.seek(start - lead)
        return file, lead


def is_ogg(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is an Ogg."""
    return head[:4] == _MAGIC


def ogg_layout(window: ByteWindow, start: int) -> Layout:
    """The streams of an Ogg file that begins at byte ``start``.

    Raises:
        AudioError: it is cut off or damaged, or several streams of audio lie side by side.
    """
    links: list[dict[int, _Logical]] = []
    position, between = start, 0
    while position < window.size:
        page = _read_page(window, position)
        if page is not None:
            _sort_in(window, links, page)
            position = page.stop
            continue
        position = skip_tags(window, position)
        following = window.find(_MAGIC, position)
        if following < 0:
            break
        between += following - position
        position = following
    streams = [_audio_of(window, link) for link in links]
    repairs = [
        *foreign(window.path, between, window.size, "between its pages"),
        *foreign_behind(window, position),
    ]
    if any(not stream.ended for stream in streams):
        repairs.append("its last page is not marked as the end of the stream")
    if len(streams) > 1:
        repairs.append(f"{len(streams)} streams that were joined")
    if not streams:
        raise AudioError(window.path, "unreadable: it is an Ogg file without a stream")
    pieces = [tuple(stream.pieces) if stream.ended else _ended(window, stream) for stream in streams]
    if len(streams) == 1 and streams[0].ended and start + between + window.size - position == 0 and len(links[0]) == 1:
        return Layout((OggStream(),), tuple(repairs))
    return Layout(tuple(map(OggStream, pieces)), tuple(repairs))


def _read_page(window: ByteWindow, start: int) -> _Page | None:
    """The page at ``start``; None where none begins."""
    header = window.read(start, _HEADER)
    if header[:4] != _MAGIC or len(header) < _HEADER:
        if len(header) < _HEADER and header[:4] == _MAGIC[: len(header[:4])]:
            raise AudioError(window.path, "truncated: its last page is cut off")
        return None
    segments = header[26]
    body = sum(window.read(start + _HEADER, segments))
    stop = start + _HEADER + segments + body
    if stop > window.size:
        if window.find(_MAGIC, start + 1) >= 0:
            raise AudioError(window.path, f"damaged: the page at byte {start} is longer than the file")
        raise AudioError(
            window.path, f"truncated: its last page has {stop - start} bytes, {window.size - start} are there"
        )
    page = window.read(start, stop - start)
    flags, granule, serial, number, checksum = struct.unpack("<BqIII", page[5:26])
    if checksum != page_checksum(page[:22] + bytes(4) + page[26:]):
        raise AudioError(window.path, f"damaged: the checksum of the page at byte {start} is wrong")
    return _Page(start, stop, flags, granule, serial, number)


def _ended(window: ByteWindow, stream: _Logical) -> tuple[Piece, ...]:
    """A stream with its end marked: the decoder of Opus refuses a last page that holds more than its position says."""
    begin, stop = stream.pieces[-1]
    page = bytearray(window.read(stream.last_page, stop - stream.last_page))
    page[5] |= _LAST_PAGE
    page[22:26] = bytes(4)
    page[22:26] = page_checksum(bytes(page)).to_bytes(4, "little")
    return *stream.pieces[:-1], *([(begin, stream.last_page)] if begin < stream.last_page else []), bytes(page)


def page_checksum(page: bytes) -> int:
    """The checksum of a page in which the four bytes that hold it are 0."""
    value = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def _sort_in(window: ByteWindow, links: list[dict[int, _Logical]], page: _Page) -> None:
    if page.flags & _FIRST_PAGE:
        if not links or any(stream.number > 0 for stream in links[-1].values()):
            links.append({})
        payload = window.read(page.start + _HEADER + window.read(page.start + 26, 1)[0], 8)
        codec = next((name for mark, name in _CODECS.items() if payload.startswith(mark)), None)
        links[-1][page.serial] = _Logical(codec)
    if not links or page.serial not in links[-1]:
        raise AudioError(window.path, "damaged: it begins in the middle of an Ogg stream, without the headers")
    stream = links[-1][page.serial]
    # A recording of a running broadcast has the headers of its beginning, then a gap.
    if page.number != stream.number + 1 and stream.number >= 0 and stream.granule > 0:
        raise AudioError(window.path, f"damaged: pages are missing before byte {page.start}")
    stream.number = page.number
    stream.granule = max(stream.granule, page.granule)
    stream.ended = bool(page.flags & _LAST_PAGE)
    stream.last_page = page.start
    if stream.pieces and stream.pieces[-1][1] == page.start:
        stream.pieces[-1] = (stream.pieces[-1][0], page.stop)
    else:
        stream.pieces.append((page.start, page.stop))


def _audio_of(window: ByteWindow, link: dict[int, _Logical]) -> _Logical:
    streams = [stream for stream in link.values() if stream.codec is not None]
    if len(streams) != 1:
        kinds = " and ".join(stream.codec for stream in streams) or "no audio"
        raise AudioError(window.path, f"its Ogg streams hold {kinds}; one stream of audio at a time can be taken")
    return streams[0]
