"""From an utterance to its waveform: 16 kHz, mono, float32.

Files are decoded by libsndfile (soundfile) alone, at the scan and ever after, because decoders differ by a few samples
at the edges of mp3 and ogg files, and the number of samples decides the number of frames.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import soundfile
from scipy.signal import resample_poly

from hubert_fast.pretrain.file_state import is_unchanged
from hubert_fast.pretrain.frames import SAMPLE_RATE

if TYPE_CHECKING:
    from hubert_fast.pretrain.manifest import Utterance

Length = TypeVar("Length", int, np.ndarray)


class AudioError(ValueError):
    """Audio that cannot be used: ``path`` and ``reason``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def resampled_length(samples: Length, rate: Length) -> Length:
    """Samples at 16 kHz of ``samples`` samples at ``rate`` Hz (ints, or int64 arrays), as `load_audio` returns them."""
    return -(-samples * SAMPLE_RATE // rate)


def load_audio(utterance: Utterance) -> np.ndarray:
    """The waveform of an utterance.

    Returns:
        float32 ``[samples]`` at 16 kHz, the mean of the channels, nominally in [-1, 1]; ``samples`` is that of the utterance.

    Raises:
        AudioError: the file is gone, cannot be decoded, is not the one that was scanned, or holds a NaN or an infinity.
    """
    path = utterance.path
    try:
        if not is_unchanged(path, utterance.state):
            raise AudioError(path, "the file changed since the scan")
        waveform = _decode(path, utterance.start, utterance.length, utterance.rate)
    except FileNotFoundError as error:
        raise AudioError(path, "there is no such file (it was there when the manifest was made)") from error
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(path, f"unreadable ({error})") from error
    if not np.isfinite(waveform).all():
        row = int(np.argmin(np.isfinite(waveform).all(axis=1)))
        raise AudioError(path, f"utterance {utterance.id!r} holds a NaN or an infinity at sample {row}")
    return resample(waveform.mean(axis=1), utterance.rate)


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """``[samples]`` at ``rate`` Hz to float32 ``[resampled_length(samples, rate)]``, 16 kHz, by a polyphase filter."""
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(waveform, dtype=np.float32)
    divisor = gcd(rate, SAMPLE_RATE)
    return resample_poly(waveform, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32, copy=False)


def normalized(waveform: np.ndarray) -> np.ndarray:
    """``[samples]`` with zero mean and unit variance (silence stays silence), as the large recipes have it."""
    variance = waveform.var(dtype=np.float64)
    return ((waveform - waveform.mean(dtype=np.float64)) / np.sqrt(variance + 1e-5)).astype(np.float32)


def _decode(path: str, start: int, samples: int, rate: int) -> np.ndarray:
    """float32 ``[samples, channels]`` of a file, from sample ``start`` on."""
    with soundfile.SoundFile(path) as file:
        found_rate = file.samplerate
        if start:
            file.seek(start)
        waveform = file.read(samples, dtype="float32", always_2d=True)
    if found_rate != rate or len(waveform) != samples:
        raise AudioError(
            path,
            f"the manifest says {samples} samples from sample {start} on at {rate} Hz, "
            f"the file gives {len(waveform)} at {found_rate} Hz",
        )
    return waveform
