"""torchaudio's HuBERT recipe: its model and loss, and the scaled gradient for peers that have no such thing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import Batch
from .peer import PeerModel

FEATURE_WEIGHT = 10.0


class RecipeModel(PeerModel):
    """torchaudio's model, or one in its place, as a script of its recipe uses it: lengths are on the device."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def loss(self, batch: Batch) -> Tensor:
        return recipe_loss(*self.module(batch.waveforms, batch.labels, lengths_on_device(batch)))

    def features(self, batch: Batch) -> Tensor:
        return self.module.wav2vec2.extract_features(batch.waveforms, lengths_on_device(batch))[0][-1]


def lengths_on_device(batch: Batch) -> Tensor | None:
    return None if batch.lengths is None else batch.lengths.to(batch.waveforms.device, non_blocking=True)


def recipe_loss(masked: Tensor, unmasked: Tensor | None, feature_penalty: Tensor) -> Tensor:
    """As torchaudio's examples/hubert computes it: unmasked frames weigh 0, and are computed all the same.

    Args:
        masked, unmasked: logits ``[frames, 1 + classes]``, the right class first.
        feature_penalty: the mean square of the features.
    """
    loss = FEATURE_WEIGHT * feature_penalty * len(masked)
    for weight, logits in ((1.0, masked), (0.0, unmasked)):
        if logits is not None:
            target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            loss = loss + weight * F.cross_entropy(logits, target, reduction="sum")
    return loss


def scale_gradient(x: Tensor, scale: float | None) -> Tensor:
    """``x``, whose gradient is ``scale`` times as large; None leaves it."""
    return x if scale is None else _ScaleGradient.apply(x, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None
