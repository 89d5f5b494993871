"""Launches of ``cosine_logits``: forward and backward of the masked frames in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import cosine_logits as kernels
from hubert_fast.ops.cosine_logits import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    frames = torch.empty(size.kept, size.final_dim, dtype=dtype, device="meta")
    label_embeddings = torch.empty(size.classes, size.final_dim, device="meta")
    labels = torch.empty(size.kept, dtype=torch.int64, device="meta")
    arguments = Arguments(frames, label_embeddings, labels)
    (logits,), saved = kernels.forward(arguments, save=True)
    kernels.backward(arguments, saved, (torch.empty_like(logits),), [True, True])
