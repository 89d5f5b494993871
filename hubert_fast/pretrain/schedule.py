"""The learning-rate schedule of the recipe: linear warm-up to the peak, then linear decay to 0."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_warmup_decay(optimizer: Optimizer, *, steps: int, warmup_fraction: float) -> LambdaLR:
    """A scheduler to be stepped once an update; ``warmup_fraction`` of the ``steps`` updates warm up.

    The last of these is the first at the peak. The decay would reach 0 one update past the last, so that no update is
    spent at a learning rate of 0.
    """
    warmup_steps = round(warmup_fraction * steps)

    def share_of_peak(step: int) -> float:  # of update number ``step``, from 0
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return max(0.0, (steps - step) / max(1, steps - warmup_steps))

    return LambdaLR(optimizer, share_of_peak)
