"""From a file to its samples, at the scan and ever after: the same samples, whichever of them are asked for.

Files are decoded by libsndfile (soundfile) alone, because decoders differ by a few samples at the edges of mp3 and ogg
files, and the number of samples decides the number of frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hubert_fast.pretrain.layout import PLAIN, read_layout
from hubert_fast.pretrain.streams import SequentialFile, Stream

_BLOCK_SAMPLES = 1 << 20


def decode(path: Path, start: int, samples: int, *, plain: int = 0) -> tuple[int, np.ndarray]:
    """The sampling rate of a file in Hz, and float32 ``[samples, channels]`` of it from sample ``start`` on; fewer
    samples where it ends before.

    Args:
        plain: the file's `plain_kind`. Where it is not 0, the file is not searched for what it holds: of a long one that takes
            longer than decoding a part.

    Raises:
        AudioError: the file is cut off or damaged.
        soundfile.SoundFileError, OSError: it cannot be read.
    """
    rate, blocks = 0, []
    streams = (PLAIN[plain - 1],) if plain else read_layout(path).streams
    for stream in streams:
        length = stream.length(str(path)) if len(streams) > 1 else start + samples
        if start < length and samples > 0:
            file, skip = stream.open_at(str(path), start)
            with file:
                rate = file.samplerate
                found = list(read_blocks(file, skip, min(samples, promised(stream, file) - start)))
            blocks += found
            samples -= sum(map(len, found))
            start = length
        start -= length
    return rate, blocks[0] if len(blocks) == 1 else np.concatenate(blocks or [np.zeros((0, 1), np.float32)])


def promised(stream: Stream, file: SequentialFile) -> int:
    """Samples that there are in an opened stream by its own account, or by the decoder's."""
    return file.frames if stream.samples is None else stream.samples


def read_blocks(file: SequentialFile, skip: int, samples: int) -> Iterator[np.ndarray]:
    """The next ``samples`` samples of an opened stream behind the next ``skip``, as float32 ``[samples, channels]``."""
    while skip > 0:
        passed = len(file.read(min(skip, _BLOCK_SAMPLES), dtype="float32", always_2d=True))
        if not passed:
            return
        skip -= passed
    while samples > 0:
        block = file.read(min(samples, _BLOCK_SAMPLES), dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block
        samples -= len(block)
