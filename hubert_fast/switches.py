"""Parts of a training step that can be turned off one by one, so that one run on a GPU measures each with and without.

They are for `scripts/gpu-check` and for tests. All are on, as predicted to be fastest, but for `folded_filters` under Triton
3.9: benchmarks/NOTES.md predicts less there without it. On and off differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Switches:
    """One flag a change, read as a step runs or is captured; a graph that was captured stays as it is."""

    narrow_copies: bool = True  # LayerNorm writes its 16-bit copy too and sums the gradients of both
    gelu_epilogues: bool = True  # GELU and its slope in the epilogues of the feed-forward's products
    attention_bias_gradient: bool = True  # attention sums its gradient over the rows for QKV's bias
    weight_copies: bool = True  # `GraphedStep` keeps 16-bit copies of the weights of products
    folded_filters: bool = True  # the positional convolution's gradient of filters: frames of a run in one product
    last_queries: bool = True  # in the last layer attention computes the queries of wanted rows alone
    wide_weight_gradients: bool = True  # products give weight gradients in float32, into their buffers


switches = Switches()


@contextmanager
def switched(**values: bool) -> Iterator[None]:
    """Set flags of `switches` inside.

    Raises:
        AttributeError: for a name that is no flag.
    """
    before = {name: getattr(switches, name) for name in values}
    vars(switches).update(values)
    try:
        yield
    finally:
        vars(switches).update(before)
