"""How evenly units are used: a model learns nothing from units that are nearly all the same one, and scores high on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats

# Units are weak whose perplexity is less than this share of the clusters, or whose commonest has more than this share of frames.
_LOW_PERPLEXITY, _LARGE_SHARE = 0.2, 0.5


class DegenerateUnitsError(ValueError):
    """Units that are nearly all the same one."""


def unit_usage(counts: np.ndarray, clusters: int) -> dict[str, Any]:
    """What a units summary says of how often each unit occurs, given the frames of each, int ``[clusters]``.

    The perplexity is 2 to the entropy, at most ``clusters``. ``commonest_share``, the most frequent unit's share of the frames,
    is the accuracy of always naming it.
    """
    shares = counts / counts.sum()
    entropy = float(scipy.stats.entropy(shares, base=2))
    return {
        "clusters": clusters,
        "units_used": int((shares > 0).sum()),
        "entropy_bits": entropy,
        "perplexity": 2.0**entropy,
        "commonest_share": float(shares.max()),
    }


def require_variety(usage: Mapping[str, Any], min_perplexity: float) -> None:
    """Raise `DegenerateUnitsError` for units of a lower perplexity."""
    if usage["perplexity"] < min_perplexity:
        raise DegenerateUnitsError(
            f"the units are nearly all the same: {_described(usage)}. Is the audio silent, or the folder the wrong one? "
            f"units.min_perplexity={min_perplexity:g} forbids to train on them; --first.units.min-perplexity 1 allows it"
        )


def weakness_of(usage: Mapping[str, Any]) -> str | None:
    """What speaks against units; None where nothing does."""
    uneven = usage["perplexity"] < _LOW_PERPLEXITY * usage["clusters"] or usage["commonest_share"] > _LARGE_SHARE
    weak = uneven or usage["units_used"] < usage["clusters"]
    return f"units that say little: {_described(usage)}" if weak else None


def _described(usage: Mapping[str, Any]) -> str:
    return (
        f"{usage['units_used']} of {usage['clusters']} units are used, their perplexity is {usage['perplexity']:.2f}, the "
        f"commonest has {usage['commonest_share']:.1%} of the frames"
    )
