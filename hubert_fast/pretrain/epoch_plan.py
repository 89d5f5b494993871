"""Which utterances form which global batch of an epoch: a pure function of their lengths, the budget, the seed and the
epoch.
"""

from __future__ import annotations

import numpy as np

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


def plan_epoch(samples: np.ndarray, budget: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """Deal every utterance into one global batch.

    Utterances are sorted by length, with noise, and cut into runs whose rows, padded to the longest, fill ``budget``. A
    last run with fewer rows than `smallest_batch` is dealt out over the others, so those exceed the budget by a row of
    the shortest utterances; whether that happens does not depend on how many processes share the batch.

    Args:
        samples: int64 ``[utterances]``, length of each row, after cropping.
        budget: samples of a global batch, padding included; at least the longest row.

    Returns:
        for each batch, in random order, the indices of its utterances, longest first.
    """
    rng = np.random.default_rng([seed, _PURPOSE, epoch])
    noisy = samples * rng.uniform(1 - _LENGTH_NOISE, 1 + _LENGTH_NOISE, size=len(samples))
    runs = fill(np.argsort(-noisy, kind="stable"), samples, budget)
    if len(runs) > 1 and len(runs[-1]) < smallest_batch(samples, budget):
        for position, index in enumerate(runs.pop()):
            runs[position % len(runs)].append(int(index))
    batches = [np.array(sorted(run, key=lambda index: -samples[index])) for run in runs]
    return [batches[position] for position in rng.permutation(len(batches))]


def fill(order: np.ndarray, samples: np.ndarray, budget: int) -> list[list[int]]:
    """Cut ``order`` (indices of utterances) into runs whose rows, padded to the longest, take ``budget`` samples at
    most.

    An utterance longer than the budget has a run of its own.
    """
    runs: list[list[int]] = [[]]
    longest = 0
    for index in order.tolist():
        longest = max(longest, int(samples[index]))
        if runs[-1] and (len(runs[-1]) + 1) * longest > budget:
            runs.append([])
            longest = int(samples[index])
        runs[-1].append(index)
    return runs
