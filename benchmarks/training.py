"""One call of what is timed: training steps, or inference, over all batches of a case."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .batches import Batch
from .clock import synchronize
from .peers.peer import PeerModel, autocast


class TrainingStep:
    """Forward, backward and AdamW (as HuBERT's recipes set it), on one peer's model.

    The learning rate is so small that all sides keep working on the same weights.
    """

    def __init__(self, model: PeerModel) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.module.parameters(), lr=1e-7, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )

    def __call__(self, batch: Batch, dtype: torch.dtype) -> None:
        self.model.module.train()
        self.model.forward_backward(batch, dtype)
        self.optimizer.step()
        if not self.model.overwrites_gradients:
            self.optimizer.zero_grad(set_to_none=True)


def infer(model: PeerModel, batch: Batch, device: torch.device, dtype: torch.dtype) -> None:
    model.module.eval()
    with torch.no_grad(), autocast(device, dtype):
        model.features(batch)


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    """Wall-clock time, with all that the device does for it: what a training loop sees."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
