import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast.pretrain.frames import FRAME_SHIFT, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_fast.pretrain.phone_metrics import chance_pnmi, frame_phones, score_units
from hubert_fast.pretrain.phones import Phone

A, B, C = 3 / 8, 3 / 8, 2 / 8
ENTROPY = -(A * math.log(A) + B * math.log(B) + C * math.log(C))
LEFT = 4 / 8 * -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))


@pytest.mark.parametrize(
    ("phones", "units", "expected"),
    [
        # Only unit 0 leaves doubt about the phone: 3 a against 1 b. The entropy of its units, (1/2, 1/4, 1/4), is 1.5 bits.
        ("aaabbbcc", [0, 0, 0, 0, 1, 1, 2, 2], (7 / 8, 7 / 8, (ENTROPY - LEFT) / ENTROPY, ENTROPY, 2 * 2**0.5, 8)),
        # Units that rename the phones.
        ("aaabbbcc", [10, 10, 10, 3, 3, 3, 17, 17], (1.0, 1.0, 1.0, ENTROPY, math.exp(ENTROPY), 8)),
        # A unit of its own for every frame knows the phone, but is no cluster.
        ("aaabbbcc", range(8), (1.0, 3 / 8, 1.0, ENTROPY, 8.0, 8)),
        # Units that are independent of the phones: the most frequent phone is the best guess.
        ("aabcaabc", [0, 0, 0, 0, 1, 1, 1, 1], (1 / 2, 1 / 2, 0.0, 1.5 * math.log(2), 2.0, 8)),
        # With one phone there is nothing to tell.
        ("aaaa", [0, 1, 0, 1], (1.0, 1 / 2, 0.0, 0.0, 2.0, 4)),
    ],
)
def test_scores_equal_cases_computed_by_hand(phones, units, expected):
    scores = score_units(np.array(list(phones)), np.array(units))
    assert dataclasses.astuple(scores) == pytest.approx(expected, abs=1e-12)


def test_chance_is_near_zero_for_a_long_sequence_and_high_for_many_units_on_few_frames():
    rng = np.random.default_rng(0)
    phones = np.repeat(rng.integers(0, 10, 5000), 4)
    assert chance_pnmi(phones, phones, seed=0) < 0.02
    assert chance_pnmi(phones[:200], rng.integers(0, 100, 200), seed=0) > 0.4


def test_chance_repeats_with_its_seed_and_takes_a_single_frame():
    rng = np.random.default_rng(1)
    phones, units = rng.integers(0, 5, 300), rng.integers(0, 20, 300)
    assert chance_pnmi(phones, units, seed=3) == chance_pnmi(phones, units, seed=3)
    assert chance_pnmi(np.array(["a"]), np.array([4]), seed=0) == 0.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9600)), min_size=1, max_size=8), st.integers(0, 40))
def test_a_frame_takes_the_phone_at_its_centre_sample(pieces, frames):
    starts = np.cumsum([0] + [length for _, length in pieces]) / SAMPLE_RATE
    alignment = [Phone(symbol, start, length / SAMPLE_RATE) for (symbol, length), start in zip(pieces, starts)]
    per_sample = [symbol for symbol, length in pieces for _ in range(length)]
    centres = [FRAME_SHIFT * t + RECEPTIVE_FIELD // 2 for t in range(frames)]
    expected = [per_sample[centre] if centre < len(per_sample) else "sil" for centre in centres]
    assert frame_phones(alignment, frames).tolist() == expected


def test_gaps_are_silence_and_order_does_not_matter():
    items = [Phone("long-symbol", 0.05, 0.02), Phone("a", 0.0, 0.02)]
    # centres at 12.5, 32.5, 52.5, 72.5 ms
    assert frame_phones(items, 4).tolist() == ["a", "sil", "long-symbol", "sil"]
    assert frame_phones([], 2).tolist() == ["sil", "sil"]
    assert frame_phones(items, 0).size == 0
