"""The learning-rate schedule of the recipe: linear warm-up to the peak, then linear decay to 0."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_decay_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate that update number ``step`` (from 0) uses.

    Update ``warmup_steps - 1`` is the first at the peak. The decay would reach 0 at update ``steps``, one past the
    last, so that no update is spent at a learning rate of 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def linear_warmup_decay(optimizer: Optimizer, *, steps: int, warmup_fraction: float) -> LambdaLR:
    """A scheduler to be stepped once an update; ``warmup_fraction`` of the ``steps`` updates warm up."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0.0 <= warmup_fraction <= 1.0:
        raise ValueError(f"warmup_fraction must lie in [0, 1], got {warmup_fraction}")
    warmup_steps = round(warmup_fraction * steps)
    return LambdaLR(optimizer, lambda step: warmup_decay_factor(step, steps=steps, warmup_steps=warmup_steps))
