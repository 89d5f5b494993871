"""The features that iteration 1 clusters: 39-dimensional MFCC on HuBERT's frame grid (HuBERT paper, section IV.B)."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import savgol_filter

from hubert_fast.pretrain.frames import FRAME_SHIFT, SAMPLE_RATE, num_frames

CEPSTRA = 13
MFCC_DIM = 3 * CEPSTRA
_DELTA_WINDOW = 5
_KALDI_FRAME_SHIFT = SAMPLE_RATE // 100


@lru_cache(maxsize=1)
def _kaldi_mfcc() -> torch.nn.Module:
    from lhotse.features.kaldi.layers import Wav2MFCC

    with warnings.catch_warnings():
        # lhotse warns that snip_edges breaks ITS mapping of durations to frames; frames.py has ours. And it calls numpy
        # functions on tensors, which numpy deprecates.
        warnings.filterwarnings("ignore", message=".*snip_edges.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return Wav2MFCC(sampling_rate=SAMPLE_RATE, num_ceps=CEPSTRA, high_freq=0.0, snip_edges=True).eval()


def mfcc39(waveform: np.ndarray) -> np.ndarray:
    """13 cepstra, their deltas and their delta-deltas, of every second Kaldi frame.

    Kaldi's defaults (25 ms Povey window, 23 mel bins from 20 Hz to 8 kHz, lifter 22, no dither), with C0 in place of
    the energy and the audio in [-1, 1], as HuBERT's own first iteration has it. Deltas are linear regressions over 5
    frames of 10 ms with the edge frames repeated, made before every second frame is dropped.

    Args:
        waveform: float32 ``[samples]`` at 16 kHz.

    Returns:
        float32 ``[num_frames(samples), 39]``.
    """
    if num_frames(len(waveform)) == 0:
        return np.empty((0, MFCC_DIM), dtype=np.float32)
    with torch.inference_mode():
        cepstra = _kaldi_mfcc()(torch.from_numpy(waveform)[None])[0].numpy()
    deltas = _deltas(cepstra)
    features = np.concatenate([cepstra, deltas, _deltas(deltas)], axis=1)
    return features[:: FRAME_SHIFT // _KALDI_FRAME_SHIFT].copy()


def _deltas(features: np.ndarray) -> np.ndarray:
    """Slope of a straight line fitted to 5 frames around each one: sum_n n x[t+n] / sum_n n^2, n = -2..2."""
    return savgol_filter(features, _DELTA_WINDOW, polyorder=1, deriv=1, axis=0, mode="nearest")
