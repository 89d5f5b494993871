"""What a user sees of a run while it goes on: bars that count audio, and lines."""

from __future__ import annotations

import sys

from tqdm import tqdm

_AUDIO_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_noinv_fmt}]"
)


def audio_progress(seconds: float, description: str, *, enabled: bool = True) -> tqdm:
    """A bar over ``seconds`` of audio; ``update`` takes seconds, and it shows audio-seconds per second."""
    # Rounded up, because the updates are floats whose sum may end a little above the total, of which tqdm would warn.
    return tqdm(
        total=seconds * (1 + 1e-6),
        desc=description,
        unit=" audio-s",
        bar_format=_AUDIO_BAR,
        mininterval=0.5,
        disable=not enabled,
    )


def say(line: str) -> None:
    """Write a line to stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)
