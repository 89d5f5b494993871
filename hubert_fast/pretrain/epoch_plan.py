"""Which utterances form which global batch of an epoch: a pure function of their lengths, the budget, the seed and the
epoch.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from hubert_fast.pretrain.like_length import LEAST_SHARE, fill

# Lengths are compared after multiplying each with a random factor in [1 - this, 1 + this]: otherwise utterances of like
# length would share their batches in every epoch.
_LENGTH_NOISE = 0.1
# Tells these random numbers from those of `utterances`, which come of the same seed and epoch.
_PURPOSE = 1


def smallest_batch(samples: np.ndarray, budget: int) -> int:
    """Rows that every global batch has at least: the longest utterances that fit, or all utterances where they are
    fewer.
    """
    return min(len(samples), budget // int(samples.max()))


def largest_parts(samples: np.ndarray, budget: int, parts: int) -> list[tuple[int, int]]:
    """The largest parts that a batch of `plan_epoch` may have, dealt evenly into ``parts``: (rows, samples of each) of one
    among the longest batches and, where there is one, of one with a row more, in batches of shorter rows.
    """
    longest, fewest = int(samples.max()), smallest_batch(samples, budget)
    most = ceil(len(samples) / (len(samples) // fewest))  # `_runs` may deal the utterances evenly
    rows = ceil(most / parts)
    largest = [(rows, longest)]
    if rows * parts < len(samples):
        largest.append((rows + 1, min(longest, budget // (rows * parts + 1))))
    return largest


def plan_epoch(samples: np.ndarray, budget: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Deal every utterance into one global batch, with utterances of like length and `smallest_batch` rows or more.

    All rows of a batch have as many frames masked as its shortest can, so a short row among long ones would cost most of
    the batch's targets. Utterances are sorted by length, with noise, and cut into runs whose rows, padded to the
    longest, fill ``budget``; a row of less than half the longest ends a run early. Where the last run, of the shortest
    utterances, has too few rows, it takes the shortest of the run before it, and so on.

    The padded rows of a batch never exceed ``budget``, but where so few utterances are shorter than the longest that the
    runs cannot have `smallest_batch` rows each: then the utterances are dealt evenly over one batch fewer, and some
    exceed it by the rows left over. The plan does not depend on how many processes share the batches.

    Args:
        samples: int64 ``[utterances]``, length of each row, after cropping.
        budget: samples of a global batch, padding included; at least the longest row.

    Returns:
        for each batch, in random order, the indices of its utterances, longest first.
    """
    rng = np.random.default_rng([seed, _PURPOSE, epoch])
    noisy = samples * rng.uniform(1 - _LENGTH_NOISE, 1 + _LENGTH_NOISE, size=len(samples))
    runs = _runs(np.argsort(-noisy, kind="stable"), samples, budget)
    batches = [np.array(sorted(run, key=lambda index: -samples[index])) for run in runs]
    return [batches[position] for position in rng.permutation(len(batches))]


def _runs(order: np.ndarray, samples: np.ndarray, budget: int) -> list[list[int]]:
    """Cut ``order`` into runs of `smallest_batch` rows or more."""
    fewest = smallest_batch(samples, budget)
    for least_share in (LEAST_SHARE, 0.0):
        runs = fill(order, samples, budget, least_share=least_share, fewest_rows=fewest)
        if len(runs) * fewest <= len(order):
            return _with_enough_rows(runs, fewest)
    # Backwards, because `array_split` makes the first parts the larger ones: they shall hold the shortest utterances.
    return [part.tolist() for part in np.array_split(order[::-1], len(order) // fewest)]


def _with_enough_rows(runs: list[list[int]], fewest: int) -> list[list[int]]:
    """Move the cuts between runs, from the last on, so that each has ``fewest`` rows, which always fit the budget."""
    for position in range(len(runs) - 1, 0, -1):
        missing = fewest - len(runs[position])
        if missing <= 0:
            break
        runs[position] = runs[position - 1][-missing:] + runs[position]
        runs[position - 1] = runs[position - 1][:-missing]
    return runs
