"""HuBERT's logits: cosine similarities of projected frames with label embeddings over a temperature.

Source: HuBERT (Hsu et al. 2021), eq. 3, in the layout of torchaudio: column 0 is the positive class, and among the
columns of all classes that follow, the positive one and every class with an equal embedding are -inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1
NORM_MIN = 1e-8


def cosine_logits(
    frames: Tensor,  # [frames, dim]
    label_embeddings: Tensor,  # [classes, dim]
    labels: Tensor,  # [frames] int64
) -> Tensor:  # [frames, 1 + classes], in the dtype of frames
    wide = torch.promote_types(frames.dtype, torch.float32)
    x, embeddings = frames.to(wide), label_embeddings.to(wide)
    positive = embeddings[labels]
    similarity = F.cosine_similarity(x[:, None], embeddings, dim=-1, eps=NORM_MIN)
    equal = (positive[:, None] == embeddings).all(-1)
    others = (similarity / TEMPERATURE).masked_fill(equal, float("-inf"))
    first = F.cosine_similarity(x, positive, dim=-1, eps=NORM_MIN)[:, None] / TEMPERATURE
    return torch.cat([first, others], dim=1).to(frames.dtype)
