import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubert_fast.pretrain.like_length import batches_of_like_length


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 5000))
def test_every_utterance_once_within_the_budget_and_of_like_length(lengths, budget):
    batches = batches_of_like_length(lengths, budget)
    samples = np.array(lengths)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * samples[batch].max() <= budget
        assert samples[batch].min() >= samples[batch].max() / 2 and (np.diff(samples[batch]) <= 0).all()


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [([5, 9, 5, 8], 18, [[1, 3], [0, 2]]), ([10, 4, 4], 100, [[0], [1, 2]]), ([30], 10, [[0]]), ([], 10, [])],
)
def test_examples(lengths, budget, expected):
    assert batches_of_like_length(lengths, budget) == expected
