"""Operator ``cosine_cross_entropy``: HuBERT's masked-prediction loss straight from projected frames, without logits."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast.ops.cosine_logits import check_cosine_arguments, cosine_flops
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import cosine_cross_entropy as reference


class Arguments(NamedTuple):
    frames: Tensor  # [frames, dim]
    label_embeddings: Tensor  # [classes, dim]
    labels: Tensor  # [frames] int64
    index: Optional[Tensor]  # [selected] int64


def cosine_cross_entropy(
    frames: Tensor,  # [frames, dim]
    label_embeddings: Tensor,  # [classes, dim]
    labels: Tensor,  # [frames] int64
    index: Optional[Tensor] = None,  # [selected] int64
) -> Tuple[Tensor, Tensor]:
    """Sum over frames of the cross-entropy of `cosine_logits` against column 0 (HuBERT, eq. 2 and 3).

    Args:
        frames: ``[frames, dim]`` float: projected frames.
        label_embeddings: ``[classes, dim]`` float.
        labels: ``[frames]`` int64 in ``[0, classes)``; a frame with a negative label is left out.
        index: ``[selected]`` int64, each at most once: only these frames count. None: all.

    Returns:
        The sum of the losses (scalar, float32 or wider), and the number of frames whose own class scores at least as high
        as every other (scalar int64, no gradient). A tie counts as correct, as in torchaudio's recipe.

    Raises:
        ValueError: for wrong ranks, sizes or dtypes.
    """
    check_cosine_arguments(frames, label_embeddings, labels)
    if index is not None and (index.dtype != torch.int64 or index.ndim != 1):
        raise ValueError(f"index must be int64 of shape [selected]; got {index.dtype} {tuple(index.shape)}")
    return _operator(Arguments(frames, label_embeddings, labels, index))


def _fake(arguments: Arguments, save: bool) -> tuple[Tensor, Tensor]:
    embeddings = arguments.label_embeddings
    loss = embeddings.new_empty((), dtype=torch.promote_types(embeddings.dtype, torch.float32))
    return loss, arguments.labels.new_empty(())


def _flops(arguments: Arguments, backward: bool) -> int:
    selected = arguments.labels if arguments.index is None else arguments.index
    return cosine_flops(len(selected), arguments.label_embeddings, backward)


_operator = Operator(
    "cosine_cross_entropy",
    Arguments,
    backends={
        "triton": "scores in registers, forward and backward; norms, selection and count in the same kernels",
        "torch": "normalise and multiply in chunks of frames, gradients in the forward",
        "reference": "cosine_logits, then log-sum-exp",
    },
    reference=lambda arguments: reference.cosine_cross_entropy(*arguments),
    results=["loss", "correct"],
    fake=_fake,
    gradients=["frames", "label_embeddings"],
    kept=["frames", "label_embeddings", "labels", "index"],
    flops=_flops,
)
