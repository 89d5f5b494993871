"""Decode a file once, from end to end, to learn what it really holds: headers lie.

What is taken, and what is left out:

- A file whose header promises no more than can be decoded is taken. So is one that lacks less than 50 ms of its promise.
- A file whose header says nothing (a placeholder, as of pipes and live encoders) or too little is taken to its last whole
  frame, page or sample, and so are files of several streams that were joined, an Ogg without its end mark, and an MP3
  without a header of length or with its last frame cut off. These are repaired.
- A file that lacks more than 50 ms of what its header promises, or ends within an Ogg page, is truncated and left out. So is
  one with a damaged or missing part in its middle, or with more than a tenth of bytes that belong to no audio.
- Tags are passed over without a word; fewer bytes of another kind before or behind the audio than that are a repair.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union

import soundfile

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.decoding import promised, read_blocks
from hubert_fast.pretrain.layout import plain_kind, read_layout
from hubert_fast.pretrain.signal_facts import SignalFacts
from hubert_fast.pretrain.streams import TRIFLE_SECONDS, SequentialFile, Stream


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds once decoded; ``samples`` per channel, ``rate`` in Hz."""

    rate: int
    channels: int
    samples: int
    channel: int | None = None
    """the channel that is taken, counted from 0; None: the mean of all"""
    plain: int = 0
    """see `layout.plain_kind`"""
    repair: str = ""
    """what is wrong with the file, where it could be read all the same"""
    silent: bool = False
    constant: bool = False
    clipped: bool = False

    @property
    def seconds(self) -> float:
        return self.samples / self.rate


def probe(path: Path, channel: Union[Literal["mix"], int] = "mix") -> AudioInfo:
    """The contents of a file, found out by decoding it from end to end.

    Args:
        channel: "mix" for the mean of the channels, or the number of the one that is taken, counted from 1.

    Raises:
        AudioError: it is no file, empty, unreadable, truncated or damaged, holds a NaN or an infinity, has no such channel,
            or channels that cancel where their mean is taken.
    """
    try:
        _require_file(path)
        return _probe(path, channel)
    except PermissionError as error:
        raise AudioError(str(path), "unreadable (no permission to read it)") from error
    except (soundfile.SoundFileError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"Error opening {str(path)!r}: ")
        raise AudioError(str(path), f"unreadable ({reason})") from error


def _require_file(path: Path) -> None:
    """Raise for what would block whoever opens it, or holds nothing."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise AudioError(str(path), "unreadable: it is a folder, a pipe or a device, not a file")
    if state.st_size == 0:
        raise AudioError(str(path), "the file is empty (0 bytes)")


def _probe(path: Path, channel: Union[Literal["mix"], int]) -> AudioInfo:
    layout = read_layout(path)
    repairs = list(layout.repairs)
    samples, first, facts = 0, None, None
    for stream in layout.streams:
        with stream.open(str(path)) as file:
            first = first or (file.samplerate, file.channels)
            if (file.samplerate, file.channels) != first:
                raise AudioError(str(path), "its streams have different sampling rates or numbers of channels")
            facts = facts or SignalFacts(_index(path, channel, file.channels))
            decoded = _decode(path, file, stream, samples, facts)
            missing = promised(stream, file) - decoded
        if missing > TRIFLE_SECONDS * first[0] or missing and stream is not layout.streams[-1]:
            raise AudioError(
                str(path), f"truncated: its header says {decoded + missing} samples, {decoded} can be decoded"
            )
        if missing:
            repairs.append(f"its header says {decoded + missing} samples, {decoded} can be decoded")
        samples += decoded
    if samples == 0:
        raise AudioError(str(path), "zero-length: it holds no samples")
    index = _index(path, channel, first[1])
    if index is None and facts.cancelled:
        raise AudioError(
            str(path),
            f"its channels cancel: their mean has {100 * facts.kept_share:.2g} % of their energy; data.channel takes one",
        )
    flags = {name: getattr(facts, name) for name in ("silent", "constant", "clipped")}
    plain = 0 if repairs else plain_kind(layout)
    return AudioInfo(*first, samples, index, plain, "; ".join(repairs), **flags)


def _index(path: Path, channel: Union[Literal["mix"], int], channels: int) -> int | None:
    if channel == "mix":
        return None
    if channel > channels:
        count = f"{channels} channel" + "s" * (channels > 1)
        raise AudioError(str(path), f"it has {count}, and data.channel is {channel}")
    return channel - 1


def _decode(path: Path, file: SequentialFile, stream: Stream, before: int, facts: SignalFacts) -> int:
    samples = 0
    try:
        for block in read_blocks(file, 0, promised(stream, file)):
            if not facts.add(block):
                raise AudioError(str(path), "it holds a NaN or an infinity")
            samples += len(block)
    except soundfile.SoundFileError as error:
        raise AudioError(
            str(path), f"truncated or damaged: decoding fails after sample {before + samples} ({error})"
        ) from error
    return samples
