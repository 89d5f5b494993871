"""How a file is handed to the decoder: as the streams that it holds, each as it lies there or mended.

A file is one stream as a rule. Files that were joined hold several, and a stream whose header is wrong is read through a
`ByteView` in which the header is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import soundfile

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.byte_view import ByteView, ByteWindow, Piece

TRIFLE_SECONDS = 0.05
"""a file that lacks no more than this of the audio that its header promises is whole: encoders miscount by a frame"""
FOREIGN_SHARE = 0.1
"""share of a file that may be bytes of another kind before or behind the audio; a file with more may hide audio in them"""


class SequentialFile(soundfile.SoundFile):
    """A file whose blocks follow one another.

    `soundfile.SoundFile.read` seeks after each block to where it already is; of an MP3 that resets the decoder, so that the
    next block begins with samples that are wrong by up to their own size.
    """

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class Stream:
    """A stretch of audio that the decoder takes as a file of its own."""

    pieces: tuple[Piece, ...] | None = None
    """the bytes that it is made of; None: the file as it is"""
    samples: int | None = None
    """what there must be by the file's own account, per channel; None: as many as the decoder says there are"""

    def open(self, path: str) -> SequentialFile:
        return SequentialFile(path if self.pieces is None else ByteView(path, self.pieces))

    def open_at(self, path: str, start: int) -> tuple[SequentialFile, int]:
        """The stream, and how many samples are to be read from it and thrown away before sample ``start`` comes."""
        file = self.open(path)
        if start:
            file.seek(start)
        return file, 0

    def length(self, path: str) -> int:
        """Samples per channel."""
        if self.samples is not None:
            return self.samples
        with self.open(path) as file:
            return file.frames


@dataclass(frozen=True)
class Layout:
    """The streams of a file, in order."""

    streams: tuple[Stream, ...]
    repairs: tuple[str, ...] = ()
    """what is wrong with the file and was put right, in words"""


def foreign(path: str, count: int, size: int, where: str) -> tuple[str, ...]:
    """The repair of a file of ``size`` bytes of which ``count``, ``where``, are of another kind.

    Raises:
        AudioError: they are too many.
    """
    if count == 0:
        return ()
    if count > FOREIGN_SHARE * size:
        raise AudioError(path, f"damaged: {count} of its {size} bytes, {where}, are no audio of its format")
    return (f"{count} bytes {where} are no audio of its format and were passed over",)


def foreign_behind(window: ByteWindow, start: int) -> tuple[str, ...]:
    """The repair of a file that is no audio from byte ``start`` on. Zeros, which disks and recorders leave, hide nothing.

    Raises:
        AudioError: it is too much of the file.
    """
    count = window.size - start
    if count > 0 and window.only_zeros(start):
        return (f"{count} zeros behind its audio were passed over",)
    return foreign(window.path, count, window.size, "behind its audio")
