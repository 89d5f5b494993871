"""From an utterance to its waveform: 16 kHz, mono, float32."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import soundfile
from scipy.signal import resample_poly

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.decoding import decode
from hubert_fast.pretrain.file_state import is_unchanged
from hubert_fast.pretrain.frames import SAMPLE_RATE

if TYPE_CHECKING:
    from hubert_fast.pretrain.manifest import Utterance

Length = TypeVar("Length", int, np.ndarray)


def resampled_length(samples: Length, rate: Length) -> Length:
    """Samples at 16 kHz of ``samples`` samples at ``rate`` Hz (ints, or int64 arrays), as `load_audio` returns them."""
    return -(-samples * SAMPLE_RATE // rate)


def load_audio(utterance: Utterance) -> np.ndarray:
    """The waveform of an utterance.

    Returns:
        float32 ``[samples]`` at 16 kHz, of the utterance's channel or the mean of all, nominally in [-1, 1]; ``samples`` is that
        of the utterance.

    Raises:
        AudioError: the file is gone, cannot be decoded, is not the one that was scanned, or holds a NaN or an infinity.
    """
    path = utterance.path
    try:
        if not is_unchanged(path, utterance.state):
            raise AudioError(path, "the file changed since the scan")
        rate, waveform = decode(Path(path), utterance.start, utterance.length, plain=utterance.plain)
    except FileNotFoundError as error:
        raise AudioError(path, "there is no such file (it was there when the manifest was made)") from error
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(path, f"unreadable ({error})") from error
    if rate != utterance.rate or len(waveform) != utterance.length or waveform.shape[1] <= (utterance.channel or 0):
        raise AudioError(
            path,
            f"the manifest says {utterance.length} samples from sample {utterance.start} on at {utterance.rate} Hz, "
            f"the file gives {len(waveform)} at {rate} Hz, of {waveform.shape[1]} channels",
        )
    if not np.isfinite(waveform).all():
        row = int(np.argmin(np.isfinite(waveform).all(axis=1)))
        raise AudioError(path, f"utterance {utterance.id!r} holds a NaN or an infinity at sample {row}")
    channels = np.ascontiguousarray(waveform.T)  # the mean over a last dimension of two takes four times as long
    return resample(channels.mean(axis=0) if utterance.channel is None else channels[utterance.channel], rate)


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
