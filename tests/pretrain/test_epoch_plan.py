import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast.pretrain.epoch_plan import plan_epoch, smallest_batch

LENGTHS = st.lists(st.integers(400, 10_000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3), st.integers(0, 5))
def test_every_utterance_is_in_exactly_one_batch_and_no_batch_is_small(lengths, rows, seed, epoch):
    samples = np.array(lengths)
    budget = rows * int(samples.max())
    plan = plan_epoch(samples, budget, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(samples)))
    assert min(map(len, plan)) >= min(smallest_batch(samples, budget), len(samples))
    assert all((np.diff(samples[batch]) <= 0).all() for batch in plan)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
def test_batches_stay_within_the_budget_but_for_rows_left_over(lengths, rows, seed):
    samples = np.array(lengths)
    budget = rows * int(samples.max())
    plan = plan_epoch(samples, budget, seed=seed, epoch=0)
    left_over = -(-(smallest_batch(samples, budget) - 1) // len(plan))
    for batch in plan:
        assert (len(batch) - left_over) * samples[batch].max() <= budget


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
