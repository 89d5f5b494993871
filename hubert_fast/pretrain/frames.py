"""The time grid every stage shares: which samples a HuBERT frame covers.

The convolutional front end of every preset has a receptive field of 400 samples and a shift of 320 samples, so frame ``t``
covers samples ``[320 t, 320 t + 400)`` at 16 kHz: 25 ms every 20 ms. Kaldi's MFCC frame ``2 t`` covers the very same samples.
"""

from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)

SAMPLE_RATE = 16_000
FRAME_SHIFT = 320
RECEPTIVE_FIELD = 400
FRAMES_PER_SECOND = SAMPLE_RATE // FRAME_SHIFT


def num_frames(samples: Count) -> Count:
    """HuBERT frames of ``samples`` samples (an int, or an int64 array) at 16 kHz; 0 where the audio is shorter than one frame."""
    if isinstance(samples, np.ndarray):
        return np.maximum(samples - RECEPTIVE_FIELD + FRAME_SHIFT, 0) // FRAME_SHIFT
    return max(samples - RECEPTIVE_FIELD + FRAME_SHIFT, 0) // FRAME_SHIFT


def num_samples(frames: int) -> int:
    """The fewest samples at 16 kHz that give ``frames`` frames."""
    if frames <= 0:
        return 0
    return RECEPTIVE_FIELD + FRAME_SHIFT * (frames - 1)
