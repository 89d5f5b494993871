"""Progress bars that count audio: how much is done, and how many seconds of it go by in a second."""

from __future__ import annotations

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
