"""The audio of an MP3 file, found by walking from frame to frame.

Many MP3s do not say how long they are, and the decoder guesses from the first frame's bit rate; it stops there. Where a Xing
header says it, a second one in the middle of the file marks where another file was joined to the first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.audio_tags import tag_length
from hubert_fast.pretrain.byte_view import ByteView, ByteWindow, Piece
from hubert_fast.pretrain.mp3_frames import (
    HEADER,
    LENGTH_TAGS,
    frame_length,
    frame_samples,
    kind,
    sampling_rate,
    silent_frame,
    tag_offset,
    without_missing_reservoir,
    xing_frame,
)
from hubert_fast.pretrain.streams import TRIFLE_SECONDS, Layout, SequentialFile, Stream, foreign, foreign_behind

_DECODER_DELAY = 529  # samples that the decoder leaves out where there is a Xing header
_PHASES = 8  # the decoder rounds alike at every eighth frame
_LEAD_FRAMES = 40  # what a frame decodes to depends on up to 24 before it (their bit reservoir), and two of overlap
_VBRI_OFFSET = HEADER + 32


@dataclass
class _Run:
    """Frames from one header of length, or from the beginning, to the next."""

    header: bytes
    tagged: bool = False
    promised: int | None = None
    """frames"""
    delay: int = 0
    padding: int = 0
    offsets: array = field(default_factory=lambda: array("q"))
    """where each frame begins"""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """whole frames that lie one behind the other"""


@dataclass(frozen=True)
class _Mp3Stream(Stream):
    """A stream that is read from any frame on, behind a header that says how many there are."""

    header: bytes = b""
    offsets: array = field(default_factory=lambda: array("q"))
    runs: tuple[tuple[int, int], ...] = ()
    left_out: int = 0
    """samples before the first that counts"""
    alone: bool = False
    """the file holds nothing else, so the decoder may read it as it is from its start on"""

    def open(self, path: str) -> SequentialFile:
        file, skip = self.open_at(path, 0)
        if skip:
            file.read(skip, dtype="float32")
        return file

    def open_at(self, path: str, start: int) -> tuple[SequentialFile, int]:
        if start == 0 and self.alone:
            file = SequentialFile(path)
            if file.frames == self.samples or (self.left_out == 0 and file.frames >= self.samples):
                return file, 0
            file.close()
        size = frame_samples(self.header)
        sample = start + self.left_out
        frame = max(0, sample // size - _LEAD_FRAMES) // _PHASES * _PHASES
        skip = (_PHASES - frame) * size - _DECODER_DELAY + sample
        return SequentialFile(ByteView(path, self._from(path, frame))), skip

    def _from(self, path: str, frame: int) -> list[Piece]:
        """The frames from number ``frame`` on, behind silent ones."""
        rest = len(self.offsets) - frame
        lead = xing_frame(self.header, rest + _PHASES) + _PHASES * silent_frame(self.header)
        border = min(frame + _LEAD_FRAMES, len(self.offsets))
        with open(path, "rb") as file:
            mended = without_missing_reservoir(self._frames(file, frame, border))
        pieces: list[Piece] = [lead + mended]
        if border < len(self.offsets):
            begin = self.offsets[border]
            pieces += [(max(begin, start), stop) for start, stop in self.runs if stop > begin]
        return pieces

    def _frames(self, file: BinaryIO, first: int, last: int) -> Iterator[bytes]:
        for offset in self.offsets[first:last]:
            file.seek(offset)
            header = file.read(HEADER)
            length = frame_length(header)
            if length == 0:
                raise AudioError(file.name, f"there is no MP3 frame at byte {offset} any more")
            yield header + file.read(length - HEADER)


def mp3_layout(window: ByteWindow, start: int) -> Layout:
    """The streams of an MP3 file; ``start`` is where its first tags end.

    Raises:
        AudioError: it holds no MP3 frames, is cut off or damaged, or holds frames that do not fit together.
    """
    walk = _Walk(window, start)
    walk.run()
    runs = [run for run in walk.runs if run.offsets or run.promised]
    if not runs:
        raise AudioError(window.path, "unreadable: it holds neither WAV, FLAC, Ogg nor MP3 audio")
    rate = sampling_rate(runs[0].header)
    size = frame_samples(runs[0].header)
    repairs = list(walk.repairs(rate, size))
    streams = []
    for run in runs:
        stream, repair = _stream(window, run, alone=len(runs) == 1 and walk.undisturbed)
        streams.append(stream)
        repairs += repair
    if len(streams) > 1:
        repairs.append(f"{len(streams)} MP3 streams that were joined")
    return Layout(tuple(streams), tuple(repairs))


def _stream(window: ByteWindow, run: _Run, *, alone: bool) -> tuple[_Mp3Stream, list[str]]:
    size, rate, frames = frame_samples(run.header), sampling_rate(run.header), len(run.offsets)
    repairs = []
    if run.promised is not None and run.promised != frames:
        missing = run.promised - frames
        # Some encoders count the frame of the Xing header too.
        if missing > max(1, TRIFLE_SECONDS * rate / size):
            raise AudioError(window.path, f"truncated: its header says {run.promised} frames, {frames} are there")
        repairs = [] if missing == 1 else [f"its header says {run.promised} frames, {frames} are there"]
    left_out = _DECODER_DELAY + run.delay if run.tagged else 0
    # What the encoder added behind the audio is at the end of its frames, however many the header counts.
    end = max(frames, run.promised or 0) * size - max(0, run.padding - _DECODER_DELAY)
    samples = max(0, min(frames * size, end) - left_out)
    return _Mp3Stream((), samples, run.header, run.offsets, tuple(run.pieces), left_out, alone), repairs


class _Walk:
    """From frame to frame through a file."""

    def __init__(self, window: ByteWindow, start: int) -> None:
        self.runs: list[_Run] = []
        self._window = window
        self._position = start
        self._kind: tuple[int, int, bool] | None = None
        self._before = self._between = self._cut = 0
        self._end = window.size

    @property
    def undisturbed(self) -> bool:
        """Nothing but whole frames between the tags."""
        return self._before + self._between + self._cut == 0 and self._end == self._window.size

    def run(self) -> None:
        window = self._window
        while self._position < window.size:
            header = window.read(self._position, HEADER)
            length = frame_length(header)
            if length and (self._kind is None and self._confirmed(header, length) or self._kind == kind(header)):
                if self._position + length > window.size:
                    self._cut = window.size - self._position
                    return
                self._take(header, length)
            elif tag := tag_length(window, self._position):
                self._position += tag
            else:
                self._pass_over()

    def repairs(self, rate: int, size: int):
        """What was passed over, in words; ``size`` is in samples a frame."""
        window = self._window
        frames = sum(len(run.offsets) for run in self.runs)
        audio = sum(stop - start for run in self.runs for start, stop in run.pieces)
        lost = self._between / max(1, audio) * frames * size / rate
        if lost > TRIFLE_SECONDS:
            raise AudioError(window.path, f"damaged: {self._between} bytes between its frames are no MP3 frames")
        yield from foreign(window.path, self._before, window.size, "before its audio")
        yield from foreign(window.path, self._between, window.size, "within its audio")
        yield from foreign_behind(window, self._end)
        if self._cut:
            yield "its last frame is cut off"

    def _confirmed(self, header: bytes, length: int) -> bool:
        """Whether more frames of the kind follow: two bytes that look like a frame's beginning are nothing rare."""
        window, position = self._window, self._position + length
        for _ in range(2):
            if position >= window.size or tag_length(window, position):
                return True
            following = window.read(position, HEADER)
            length = frame_length(following)
            if not length or kind(following) != kind(header):
                return False
            position += length
        return True

    def _take(self, header: bytes, length: int) -> None:
        if self._kind is None:
            self._kind = kind(header)
        window, start = self._window, self._position
        self._position += length
        offset = tag_offset(header) + (0 if header[1] & 1 else 2)
        if window.read(start + offset, 4) in LENGTH_TAGS:
            self.runs.append(_read_xing(header, window.read(start, length)[offset:]))
            return
        if window.read(start + _VBRI_OFFSET, 4) == b"VBRI":
            promised = int.from_bytes(window.read(start + _VBRI_OFFSET + 14, 4), "big")
            self.runs.append(_Run(header, promised=promised))
            return
        if not self.runs:
            self.runs.append(_Run(header))
        run = self.runs[-1]
        run.offsets.append(start)
        if run.pieces and run.pieces[-1][1] == start:
            run.pieces[-1] = (run.pieces[-1][0], self._position)
        else:
            run.pieces.append((start, self._position))

    def _pass_over(self) -> None:
        """Go to the next frame, or to the end."""
        window, start = self._window, self._position
        position = start + 1
        while (position := window.find(b"\xff", position)) >= 0:
            self._position = position
            header = window.read(position, HEADER)
            length = frame_length(header)
            if length and self._confirmed(header, length) and position + length <= window.size:
                if self._kind is not None and kind(header) != self._kind:
                    raise AudioError(
                        window.path, f"from byte {position} on its frames have another sampling rate or channel count"
                    )
                if self._kind is None:
                    self._before += position - start
                else:
                    self._between += position - start
                return
            position += 1
        self._position, self._end = window.size, start


def _read_xing(header: bytes, tag: bytes) -> _Run:
    """What a Xing or Info header says of the frames behind it; ``tag`` begins with its name."""
    run = _Run(header, tagged=True)
    flags = int.from_bytes(tag[4:8], "big")
    position = 8
    if flags & 1:
        run.promised = int.from_bytes(tag[position : position + 4], "big")
        position += 4
    position += 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if len(tag) >= position + 24 and tag[position]:
        packed = int.from_bytes(tag[position + 21 : position + 24], "big")
        run.delay, run.padding = packed >> 12, packed & 0xFFF
    return run
