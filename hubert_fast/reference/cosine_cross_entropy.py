"""Cross-entropy of HuBERT's logits against column 0, summed, and how many frames it gets right."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from hubert_fast.reference.cosine_logits import cosine_logits


def cosine_cross_entropy(
    frames: Tensor,  # [frames, dim]
    label_embeddings: Tensor,  # [classes, dim]
    labels: Tensor,  # [frames] int64; a negative one leaves its frame out
    index: Optional[Tensor] = None,  # [selected] int64: the frames that count; None: all
) -> tuple[
    Tensor, Tensor
]:  # [] float32 or wider: sum of losses; [] int64: frames where no class beats the positive one
    if index is not None:
        frames, labels = frames[index], labels[index]
    counted = labels >= 0  # not selected: in a program that is exported no shape may follow from labels
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32)).masked_fill(~counted[:, None], 0.0)
    logits = cosine_logits(frames, label_embeddings, labels.clamp(min=0))
    losses = logits.logsumexp(1) - logits[:, 0]
    return losses.masked_fill(~counted, 0.0).sum(), (counted & (logits[:, 0] >= logits[:, 1:].amax(1))).sum()
