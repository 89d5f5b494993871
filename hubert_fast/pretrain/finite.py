"""Stops training at the first loss or gradient that is not finite, and says which utterances were in the batch."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteTrainingError(RuntimeError):
    """The loss or the gradient was infinite or NaN at update ``step`` (from 1) on this rank's utterances ``ids``."""

    def __init__(self, step: int, ids: list[str], what: str) -> None:
        super().__init__(
            f"the {what} is not finite (NaN or infinite) at step {step}; utterances of this rank's batch: "
            f"{', '.join(ids)}. Earlier checkpoints are untouched; a lower learning rate or clip_norm may help, or "
            "removing a bad utterance"
        )
        self.step = step
        self.ids = ids


class FiniteGuard:
    """Watches losses and gradient norms on the device; only `check` copies a number to the host.

    On a GPU, checking every step would make the host wait for the device, so the first bad step is noted on the device
    and `check` is called when metrics are logged and before anything is saved.
    """

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.zeros(
            2, dtype=torch.int64, device=device
        )  # steps: of the loss, of the gradient; 0: none
        self._ids: dict[int, list[str]] = {}

    def watch(self, step: int, ids: list[str], loss: Tensor, gradient_norm: Tensor) -> None:
        """Note the scalars ``loss`` (this rank's) and ``gradient_norm`` of update ``step`` (from 1)."""
        self._ids[step] = ids
        bad = torch.stack([~torch.isfinite(loss.detach()), ~torch.isfinite(gradient_norm.detach())])
        self._first_bad = torch.where(bad & (self._first_bad == 0), step, self._first_bad)

    def check(self) -> None:
        """Raise `NonFiniteTrainingError` if anything watched since the last check was not finite."""
        of_loss, of_gradient = self._first_bad.tolist()
        if of_loss or of_gradient:
            step = min(bad for bad in (of_loss, of_gradient) if bad)
            raise NonFiniteTrainingError(step, self._ids[step], "loss" if step == of_loss else "gradient")
        self._ids.clear()
