"""From a cut to its waveform: 16 kHz, mono, float32."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
from scipy.signal import resample_poly

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.decoding import decode
from hubert_fast.pretrain.frames import SAMPLE_RATE

if TYPE_CHECKING:
    from lhotse.cut import Cut


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz of ``samples`` samples at ``rate`` Hz, as `load_audio` returns them."""
    return -(-samples * SAMPLE_RATE // rate)


def utterance_samples(cut: Cut) -> int:
    """Samples of a cut at 16 kHz: exactly what `load_audio` returns, without reading the file."""
    return cut.custom["samples_16k"]


def load_audio(cut: Cut) -> np.ndarray:
    """The waveform of a cut.

    Returns:
        float32 ``[samples]`` at 16 kHz, the mean of the cut's channels, nominally in [-1, 1]; ``samples`` is
        `utterance_samples` of the cut.

    Raises:
        AudioError: the file is gone, cannot be decoded, is not the one that was scanned, or holds a NaN or an infinity.
    """
    path = cut.recording.sources[0].source
    waveform = _decode(path, round(cut.start * cut.sampling_rate), cut.num_samples, cut.sampling_rate)
    if not np.isfinite(waveform).all():
        row = int(np.argmin(np.isfinite(waveform).all(axis=1)))
        raise AudioError(path, f"utterance {cut.id!r} holds a NaN or an infinity at sample {row}")
    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    return resample(waveform[:, channels].mean(axis=1), cut.sampling_rate)


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
    if not Path(path).is_file():
        raise AudioError(path, "there is no such file (it was there when the manifest was made)")
    try:
        found_rate, waveform = decode(Path(path), start, samples)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(path, f"unreadable ({error})") from error
    if found_rate != rate or len(waveform) != samples:
        raise AudioError(
            path,
            f"the manifest says {samples} samples from sample {start} on at {rate} Hz, "
            f"the file gives {len(waveform)} at {found_rate} Hz: it changed, scan again",
        )
    return waveform
