"""Batches of utterances of like length, which waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_SHARE = 0.5
"""Of the longest row of a batch, what the shortest has at least, unless another rule forbids"""


def batches_of_like_length(samples: Sequence[int] | np.ndarray, budget: float) -> list[list[int]]:
    """Indices into ``samples``, longest first, in batches of at most ``budget`` samples, padding included (or one longer
    utterance).
    """
    samples = np.asarray(samples, dtype=np.int64)
    return fill(np.argsort(-samples, kind="stable"), samples, budget)


def fill(
    order: np.ndarray,
    samples: np.ndarray,
    budget: float,
    *,
    least_share: float = LEAST_SHARE,
    fewest_rows: int = 1,
) -> list[list[int]]:
    """Cut ``order`` into runs whose rows, padded to the longest, take ``budget`` samples at most.

    A row shorter than ``least_share`` of the longest starts a run of its own once the run before has ``fewest_rows``.
    An utterance longer than the budget has a run of its own.

    Args:
        order: indices into ``samples`` (int64 ``[utterances]``), by falling length or nearly so; none is allowed.
    """
    runs: list[list[int]] = []
    shortest = longest = 0
    for index in order.tolist():
        length = int(samples[index])
        shortest, longest = min(shortest, length), max(longest, length)
        if not runs or _is_full(len(runs[-1]), shortest, longest, budget, least_share, fewest_rows):
            runs.append([])
            shortest = longest = length
        runs[-1].append(index)
    return runs


def _is_full(rows: int, shortest: int, longest: int, budget: float, least_share: float, fewest_rows: int) -> bool:
    """Whether ``rows`` rows cannot take one more, with which these are the shortest and the longest."""
    return (rows + 1) * longest > budget or (rows >= fewest_rows and shortest < least_share * longest)
