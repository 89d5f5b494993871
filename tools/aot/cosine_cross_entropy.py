"""Launches of ``cosine_cross_entropy``: forward and backward, of all frames and of selected ones, in a model's shapes."""

from __future__ import annotations

import torch

from benchmarks.sizes import Size
from hubert_fast.kernels import cosine_cross_entropy as kernels
from hubert_fast.ops.cosine_cross_entropy import Arguments


def launches(size: Size, dtype: torch.dtype) -> None:
    label_embeddings = torch.empty(size.classes, size.final_dim, device="meta")
    grad = torch.empty((), device="meta")
    index = torch.empty(size.kept, dtype=torch.int64, device="meta")
    for rows, selected in ((size.kept, None), (size.rows, index)):
        frames = torch.empty(rows, size.final_dim, dtype=dtype, device="meta")
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        arguments = Arguments(frames, label_embeddings, labels, selected)
        _, saved = kernels.forward(arguments, save=True)
        kernels.backward(arguments, saved, (grad, None), [True, True])
