"""How well discrete units tell phones apart: phone purity, cluster purity and PNMI of frame-aligned sequences.

The measures are those of HuBERT (Hsu et al. 2021, arXiv 2106.07447), taken over the joint distribution of the phone and
the unit of each frame. As in the script released with the paper, silence is a phone like any other. The paper scored
hours of speech; on a small held-out part the same measures are biased upwards (many units, few frames: each unit tells
phones apart by accident), so `chance_pnmi` measures what the same units score where they cannot know the phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hubert_fast.pretrain.frames import FRAME_SHIFT, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_fast.pretrain.phones import Phone

SILENCE = "sil"


@dataclass(frozen=True)
class PhoneScores:
    """Agreement of units with phones; purities and ``pnmi`` lie in [0, 1], entropies are in nats."""

    phone_purity: float
    """frame accuracy of a listener who hears the unit and names the phone most often found with it"""
    cluster_purity: float
    """frame accuracy of guessing the unit from the phone; falls as units get finer"""
    pnmi: float
    """phone-normalised mutual information I(phone; unit) / H(phone): the share of the doubt about the phone that the
    unit removes"""
    phone_entropy: float
    unit_perplexity: float
    """exp H(unit): how many equally frequent units would be as varied"""
    frames: int


def frame_phones(alignment: Sequence[Phone], frames: int) -> np.ndarray:
    """The phone at the centre sample, ``320 t + 200`` at 16 kHz, of each HuBERT frame ``t``.

    Args:
        alignment: phones in any order. Of those that overlap, the one that starts last counts.
        frames: how many frames.

    Returns:
        str array ``[frames]``; a frame that no phone covers is silence (``"sil"``).
    """
    phones = np.full(frames, SILENCE, dtype=object)
    for symbol, start, duration in sorted(alignment, key=lambda phone: phone.start):
        phones[_first_centred_at(start) : _first_centred_at(start + duration)] = symbol
    return phones.astype(str)


def _first_centred_at(seconds: float) -> int:
    """The first frame whose centre is at ``seconds`` or later. Rounded to samples: 0.1 + 0.2 must not move a frame."""
    sample = round(seconds * SAMPLE_RATE)
    return max(0, -((RECEPTIVE_FIELD // 2 - sample) // FRAME_SHIFT))


def score_units(phones: np.ndarray, units: np.ndarray) -> PhoneScores:
    """Score two aligned sequences.

    With one phone there is nothing to tell apart: ``pnmi`` is 0.

    Args:
        phones: ``[frames]``, str or integer; at least one.
        units: ``[frames]``, integer.
    """
    from scipy.stats import entropy
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(phones, units)  # int64 [distinct phones, distinct units]
    phone_entropy, unit_entropy = float(entropy(counts.sum(axis=1))), float(entropy(counts.sum(axis=0)))
    information = max(0.0, phone_entropy + unit_entropy - float(entropy(counts.ravel())))
    return PhoneScores(
        phone_purity=float(counts.max(axis=0).sum() / counts.sum()),
        cluster_purity=float(counts.max(axis=1).sum() / counts.sum()),
        pnmi=min(1.0, information / phone_entropy) if phone_entropy > 0 else 0.0,
        phone_entropy=phone_entropy,
        unit_perplexity=float(np.exp(unit_entropy)),
        frames=int(counts.sum()),
    )


def chance_pnmi(phones: np.ndarray, units: np.ndarray, *, seed: int, shifts: int = 10) -> float:
    """The PNMI of units that cannot know the phone: the same sequence, rotated against the phones.

    A rotation keeps how often units occur and how long they last, which shuffling single frames would not, so that the
    bias of a short sequence is kept too. Both sequences are ``[frames]``, utterances one after the other. Returns the
    mean of ``shifts`` random rotations.
    """
    phones = np.unique(np.asarray(phones), return_inverse=True)[1]
    units = np.asarray(units)
    # A rotation by a tenth of the sequence at least, so that a unit does not meet its own phone again.
    margin = units.size // 10
    rotations = np.random.default_rng(seed).integers(margin, max(units.size - margin, margin + 1), size=shifts)
    return float(np.mean([score_units(phones, np.roll(units, rotation)).pnmi for rotation in rotations]))
