"""Operator ``cosine_logits``: cosine similarities of frames with label embeddings, as torchaudio lays them out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubert_fast.ops.operator import Operator
from hubert_fast.reference import cosine_logits as reference


class Arguments(NamedTuple):
    frames: Tensor  # [frames, dim]
    label_embeddings: Tensor  # [classes, dim]
    labels: Tensor  # [frames] int64


def cosine_logits(
    frames: Tensor,  # [frames, dim]
    label_embeddings: Tensor,  # [classes, dim]
    labels: Tensor,  # [frames] int64
) -> Tensor:
    """Logits of projected frames (HuBERT, eq. 3, with temperature 0.1).

    Args:
        frames: ``[frames, dim]`` float: projected frames.
        label_embeddings: ``[classes, dim]`` float.
        labels: ``[frames]`` int64 in ``[0, classes)``.

    Returns:
        ``[frames, 1 + classes]`` in the dtype of ``frames``, computed in float32 or wider: column 0 is the similarity with
        the frame's own class, columns 1.. those with every class, over 0.1; the column of its own class, and of any class
        with an equal embedding, is -inf. Norms are clamped at 1e-8.

    Raises:
        ValueError: for wrong ranks, sizes or dtypes.
    """
    check_cosine_arguments(frames, label_embeddings, labels)
    return _operator(Arguments(frames, label_embeddings, labels))[0]


def check_cosine_arguments(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> None:
    if frames.ndim != 2 or label_embeddings.ndim != 2 or frames.shape[1] != label_embeddings.shape[1]:
        raise ValueError(
            "frames must be [frames, dim] and label_embeddings [classes, dim] with the same dim; got "
            f"{tuple(frames.shape)} and {tuple(label_embeddings.shape)}"
        )
    if not frames.is_floating_point() or not label_embeddings.is_floating_point():
        raise ValueError(
            f"frames and label_embeddings must be floating point; got {frames.dtype} and {label_embeddings.dtype}"
        )
    if labels.dtype != torch.int64 or labels.shape != frames.shape[:1]:
        raise ValueError(f"labels must be int64 of shape [{frames.shape[0]}]; got {labels.dtype} {tuple(labels.shape)}")


def cosine_flops(frames: int, label_embeddings: Tensor, backward: bool) -> int:
    """A product of ``frames`` with all classes; two of its size backward."""
    return (2 if backward else 1) * 2 * frames * label_embeddings.numel()


_operator = Operator(
    "cosine_logits",
    Arguments,
    backends={
        "triton": "norms, products, temperature and -inf in one kernel; two products for the gradients",
        "torch": "normalise, then one matrix product",
        "reference": "cosine_similarity of every frame with every class",
    },
    reference=lambda arguments: (reference.cosine_logits(*arguments),),
    results=["logits"],
    fake=lambda arguments, save: (
        arguments.frames.new_empty(arguments.labels.shape[0], 1 + arguments.label_embeddings.shape[0]),
    ),
    gradients=["frames", "label_embeddings"],
    kept=["frames", "label_embeddings", "labels"],
    flops=lambda arguments, backward: cosine_flops(len(arguments.labels), arguments.label_embeddings, backward),
)
