"""The sides of the whole-step benchmark: each builds a model from the same weights and runs one training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubert_fast
from benchmarks.torchaudio_peer import import_models

# A side's loss of a batch: (waveforms, labels) -> scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


def hubert_fast_loss(model: hubert_fast.HuBERTPretrainModel) -> Loss:
    objective = hubert_fast.PretrainingObjective(model)
    return lambda waveforms, labels: objective(waveforms, labels).loss


def torchaudio_loss(model: nn.Module) -> Loss:
    """torchaudio's recipe: cross-entropy of the masked logits times 1, of the unmasked ones times 0, and the penalty."""

    def loss(waveforms: Tensor, labels: Tensor) -> Tensor:
        masked, unmasked, penalty = model(waveforms, labels)
        total = 10.0 * penalty * len(masked)
        for weight, logits in ((1.0, masked), (0.0, unmasked)):
            target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            total = total + weight * F.cross_entropy(logits, target, reduction="sum")
        return total

    return loss


def build(side: str, num_classes: int, **arguments: float) -> tuple[nn.Module, Loss]:
    """HuBERT Base of ``side`` with the weights that seed 0 gives on both sides."""
    torch.manual_seed(0)
    if side == "hubert_fast":
        model = hubert_fast.hubert_pretrain_base(num_classes=num_classes, **arguments)
        return model, hubert_fast_loss(model)
    theirs = import_models().hubert_pretrain_base(num_classes=num_classes, **arguments)
    return theirs, torchaudio_loss(theirs)


SIDES = ("hubert_fast", "torchaudio")
