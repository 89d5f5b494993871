import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_fast.pretrain.frames import FRAME_SHIFT, RECEPTIVE_FIELD, SAMPLE_RATE
from hubert_fast.pretrain.phone_metrics import chance_pnmi, frame_phones, joint_counts, phone_scores, score_units


def test_scores_equal_a_case_computed_by_hand():
    # unit 0: a a a b; unit 1: b b; unit 2: c c
    phones = np.array(list("aaabbbcc"))
    units = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    counts = joint_counts(phones, units)
    assert counts.tolist() == [[3, 0, 0], [1, 2, 0], [0, 0, 2]]
    scores = phone_scores(counts)
    assert scores.phone_purity == pytest.approx((3 + 2 + 2) / 8)
    assert scores.cluster_purity == pytest.approx((3 + 2 + 2) / 8)
    phone_entropy = -(3 / 8 * math.log(3 / 8) * 2 + 2 / 8 * math.log(2 / 8))
    # only unit 0 leaves doubt about the phone: 3 a against 1 b
    left = 4 / 8 * -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert scores.phone_entropy == pytest.approx(phone_entropy)
    assert scores.pnmi == pytest.approx((phone_entropy - left) / phone_entropy)
    assert scores.unit_perplexity == pytest.approx(2 * 2**0.5)  # entropy of (1/2, 1/4, 1/4) is 1.5 bits
    assert scores.frames == 8


def test_a_code_that_renames_the_phones_scores_one():
    phones = np.array(list("abcabcaab"))
    scores = score_units(phones, np.unique(phones, return_inverse=True)[1] * 7 + 3)
    assert scores.pnmi == pytest.approx(1.0)
    assert scores.phone_purity == scores.cluster_purity == 1.0


def test_an_independent_code_has_no_mutual_information():
    phones = np.array(["a", "a", "b", "c"] * 5)
    scores = phone_scores(np.outer([10, 5, 5], [2, 1, 1]))
    assert scores.pnmi == pytest.approx(0.0, abs=1e-12)
    assert scores.phone_purity == pytest.approx(0.5), "the most frequent phone is the best guess"
    assert score_units(phones, np.zeros(20, dtype=int)).pnmi == pytest.approx(0.0, abs=1e-12)


def test_a_unit_of_its_own_for_every_frame_knows_the_phone_but_is_no_cluster():
    phones = np.array(list("aabbbc"))
    scores = score_units(phones, np.arange(6))
    assert scores.phone_purity == 1.0 and scores.pnmi == pytest.approx(1.0)
    assert scores.cluster_purity == pytest.approx(3 / 6)
    assert scores.unit_perplexity == pytest.approx(6.0)


def test_with_one_phone_there_is_nothing_to_tell():
    scores = score_units(np.array(["sil"] * 4), np.array([0, 1, 0, 1]))
    assert scores.pnmi == 0.0 and scores.phone_entropy == 0.0 and scores.phone_purity == 1.0


@st.composite
def sequences(draw):
    frames = draw(st.integers(1, 60))
    phones = draw(st.lists(st.integers(0, 5), min_size=frames, max_size=frames))
    units = draw(st.lists(st.integers(0, 8), min_size=frames, max_size=frames))
    return np.array(phones), np.array(units)


@settings(deadline=None, max_examples=60)
@given(sequences(), st.integers(0, 2**32 - 1))
def test_scores_stay_in_range_and_ignore_names_and_order(pair, seed):
    phones, units = pair
    scores = score_units(phones, units)
    most_frequent = np.bincount(phones).max() / phones.size
    assert most_frequent <= scores.phone_purity <= 1.0
    assert 0.0 < scores.cluster_purity <= 1.0
    assert 0.0 <= scores.pnmi <= 1.0
    assert 1.0 - 1e-9 <= scores.unit_perplexity <= np.unique(units).size + 1e-9
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(phones.size), rng.permutation(9)
    again = score_units(phones[order], names[units[order]])
    np.testing.assert_allclose(list(vars(again).values()), list(vars(scores).values()), atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(sequences(), st.data())
def test_splitting_units_never_loses_information(pair, data):
    phones, units = pair
    finer = units * 2 + np.array(data.draw(st.lists(st.integers(0, 1), min_size=units.size, max_size=units.size)))
    before, after = score_units(phones, units), score_units(phones, finer)
    assert after.pnmi >= before.pnmi - 1e-9
    assert after.phone_purity >= before.phone_purity
    assert after.cluster_purity <= before.cluster_purity


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
    alignment = [(symbol, start, length / SAMPLE_RATE) for (symbol, length), start in zip(pieces, starts)]
    per_sample = [symbol for symbol, length in pieces for _ in range(length)]
    centres = [FRAME_SHIFT * t + RECEPTIVE_FIELD // 2 for t in range(frames)]
    expected = [per_sample[centre] if centre < len(per_sample) else "sil" for centre in centres]
    assert frame_phones(alignment, frames).tolist() == expected


def test_gaps_are_silence_and_order_and_extra_fields_do_not_matter():
    from lhotse.supervision import AlignmentItem

    items = [AlignmentItem("long-symbol", 0.05, 0.02), AlignmentItem("a", 0.0, 0.02, score=0.5)]
    # centres at 12.5, 32.5, 52.5, 72.5 ms
    assert frame_phones(items, 4).tolist() == ["a", "sil", "long-symbol", "sil"]
    assert frame_phones([], 2).tolist() == ["sil", "sil"]
    assert frame_phones(items, 0).size == 0


def test_bad_arguments_are_named():
    for message, call in (
        (r"phones and units .*\(3,\) and \(2,\)", lambda: joint_counts(np.zeros(3), np.zeros(2))),
        ("at least one", lambda: joint_counts(np.zeros(0), np.zeros(0))),
        ("at least one", lambda: phone_scores(np.zeros((0, 0), dtype=int))),
        ("frames must not be negative; got -1", lambda: frame_phones([], -1)),
        ("shifts", lambda: chance_pnmi(np.zeros(3), np.zeros(3), seed=0, shifts=0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
