import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast.pretrain.epoch_plan import largest_parts, plan_epoch, smallest_batch

LENGTHS = st.lists(st.integers(400, 10_000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3), st.integers(0, 5))
def test_every_utterance_is_in_one_batch_no_batch_is_small_and_one_is_too_large_only_where_that_forces_it(
    lengths, rows, seed, epoch
):
    samples = np.array(lengths)
    budget = rows * int(samples.max())
    plan = plan_epoch(samples, budget, seed=seed, epoch=epoch)
    fewest = smallest_batch(samples, budget)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(samples)))
    assert min(map(len, plan)) >= min(fewest, len(samples))
    assert all((np.diff(samples[batch]) <= 0).all() for batch in plan)
    if any(len(batch) * samples[batch].max() > budget for batch in plan):
        left_over = len(samples) - len(plan) * fewest
        assert 0 < left_over < fewest  # one batch more would leave some with fewer rows
        assert max(map(len, plan)) <= fewest + -(-left_over // len(plan))


@given(LENGTHS, st.integers(1, 20), st.integers(1, 8), st.integers(0, 5))
def test_no_part_of_a_batch_is_larger_than_the_largest_that_are_foretold(lengths, rows, parts, epoch):
    samples = np.array(lengths)
    budget = rows * int(samples.max())
    largest = largest_parts(samples, budget, parts)
    for batch in plan_epoch(samples, budget, seed=0, epoch=epoch):
        dealt = -(-len(batch) // parts)
        assert dealt * samples[batch].max() <= max(count * length for count, length in largest)


@pytest.mark.parametrize("utterances", [400, 401, 1237, 5000])
@pytest.mark.parametrize("rows", [4, 15, 40])
@pytest.mark.parametrize("distribution", ["even", "few_short"])
def test_speech_of_2_to_16_seconds_shares_no_batch_with_rows_of_twice_its_length(utterances, rows, distribution):
    rng = np.random.default_rng(utterances)
    longest = 250_000
    share = rng.uniform(size=utterances) if distribution == "even" else rng.beta(4, 1.5, size=utterances)
    samples = (32_000 + share * (longest - 32_000)).astype(np.int64)
    budget = rows * longest
    for epoch in range(3):
        plan = plan_epoch(samples, budget, seed=0, epoch=epoch)
        assert sorted(np.concatenate(plan).tolist()) == list(range(utterances))
        fewest = smallest_batch(samples, budget)
        # No batch of this many rows that holds the shortest utterances has a shorter longest one, but for the noise.
        unavoidable = np.sort(samples)[:fewest].max() * 1.25
        for batch in plan:
            size = len(batch) * samples[batch].max()
            assert fewest <= len(batch) and size <= budget
            assert samples[batch].min() >= 0.5 * samples[batch].max() or samples[batch].max() <= unavoidable


def test_rows_left_over_join_the_shortest_utterances():
    """One utterance of 2 s after batches of 10 s and of 15.6 s that are full: it must not meet the longest."""
    samples = np.array([250_000] * 30 + [160_000] * 46 + [32_000])
    plan = plan_epoch(samples, 15 * 250_000, seed=0, epoch=0)
    (batch,) = [batch for batch in plan if 76 in batch]
    assert len(batch) == 15 and samples[batch].max() == 160_000


def test_the_plan_is_reproducible_and_differs_by_epoch_and_seed():
    samples = np.random.default_rng(0).integers(16_000, 160_000, 200)
    plans = {key: plan_epoch(samples, 10 * 160_000, seed=key[0], epoch=key[1]) for key in [(0, 0), (0, 1), (1, 0)]}
    again = plan_epoch(samples, 10 * 160_000, seed=0, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(plans[0, 0], again, strict=True))
    members = {key: {tuple(sorted(batch)) for batch in plan} for key, plan in plans.items()}
    assert members[0, 0] != members[0, 1] and members[0, 0] != members[1, 0]


def test_rows_of_a_batch_are_of_like_length():
    samples = np.random.default_rng(0).integers(16_000, 160_000, 500)
    plan = plan_epoch(samples, 20 * 160_000, seed=0, epoch=0)
    padded = sum(len(batch) * samples[batch].max() for batch in plan)
    assert samples.sum() / padded > 0.85


def test_batches_come_in_random_order_of_length():
    samples = np.arange(16_000, 116_000, 500)
    longest = [samples[batch].max() for batch in plan_epoch(samples, 500_000, seed=0, epoch=0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_utterances_of_one_length_fill_batches_of_the_same_size(rows):
    plan = plan_epoch(np.full(20, 8000), rows * 8000, seed=0, epoch=0)
    assert sum(map(len, plan)) == 20 and max(map(len, plan)) - min(map(len, plan)) <= 1
