"""Operator ``cosine_cross_entropy``: HuBERT's masked-prediction loss straight from projected frames, without logits."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.ops.cosine_logits import check_cosine_arguments
from hubert_fast.reference import cosine_cross_entropy as reference
from hubert_fast.torch_backend import cosine_cross_entropy as torch_backend

backend.register(
    "cosine_cross_entropy",
    {
        "torch": "normalise and multiply in chunks of frames, recomputed in the backward",
        "reference": "cosine_logits, then log-sum-exp",
    },
)


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
    if backend.choose("cosine_cross_entropy", lambda name: None) == "reference":
        return reference.cosine_cross_entropy(frames, label_embeddings, labels, index)
    loss, correct, _ = _cosine_cross_entropy(frames, label_embeddings, labels, index)
    return loss, correct


@torch.library.custom_op("hubert_fast::cosine_cross_entropy", mutates_args=())
def _cosine_cross_entropy(
    frames: Tensor, label_embeddings: Tensor, labels: Tensor, index: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    with without_autocast(frames.device):
        return torch_backend.cosine_cross_entropy(frames, label_embeddings, labels, index)


@_cosine_cross_entropy.register_fake
def _(frames, label_embeddings, labels, index):
    dtype = torch.promote_types(label_embeddings.dtype, torch.float32)
    selected = labels.shape[0] if index is None else index.shape[0]
    return frames.new_empty((), dtype=dtype), labels.new_empty(()), frames.new_empty(selected, dtype=dtype)


@torch.library.custom_op("hubert_fast::cosine_cross_entropy_backward", mutates_args=())
def _cosine_cross_entropy_backward(
    grad: Tensor, frames: Tensor, label_embeddings: Tensor, labels: Tensor, index: Optional[Tensor], lse: Tensor
) -> Tuple[Tensor, Tensor]:
    with without_autocast(frames.device):
        return torch_backend.cosine_cross_entropy_backward(grad, frames, label_embeddings, labels, index, lse)


@_cosine_cross_entropy_backward.register_fake
def _(grad, frames, label_embeddings, labels, index, lse):
    return torch.empty_like(frames), torch.empty_like(label_embeddings)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx, grad, _correct_grad, _lse_grad):
    return *_cosine_cross_entropy_backward(grad, *ctx.saved_tensors), None, None


_cosine_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
