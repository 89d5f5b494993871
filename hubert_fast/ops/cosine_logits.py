"""Operator ``cosine_logits``: cosine similarities of frames with label embeddings, as torchaudio lays them out."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.reference import cosine_logits as reference
from hubert_fast.torch_backend import cosine_logits as torch_backend

backend.register(
    "cosine_logits",
    {
        "torch": "normalise, then one matrix product",
        "reference": "cosine_similarity of every frame with every class",
    },
)


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
    if backend.choose("cosine_logits", lambda name: None) == "reference":
        return reference.cosine_logits(frames, label_embeddings, labels)
    return _cosine_logits(frames, label_embeddings, labels)


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


@torch.library.custom_op("hubert_fast::cosine_logits", mutates_args=())
def _cosine_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    with without_autocast(frames.device):
        return torch_backend.cosine_logits(frames, label_embeddings, labels)


@_cosine_logits.register_fake
def _(frames, label_embeddings, labels):
    return frames.new_empty(frames.shape[0], 1 + label_embeddings.shape[0])


@torch.library.custom_op("hubert_fast::cosine_logits_backward", mutates_args=())
def _cosine_logits_backward(
    grad: Tensor, frames: Tensor, label_embeddings: Tensor, labels: Tensor
) -> Tuple[Tensor, Tensor]:
    with without_autocast(frames.device):
        return torch_backend.cosine_logits_backward(grad, frames, label_embeddings, labels)


@_cosine_logits_backward.register_fake
def _(grad, frames, label_embeddings, labels):
    return torch.empty_like(frames), torch.empty_like(label_embeddings)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *_cosine_logits_backward(grad, *ctx.saved_tensors), None


_cosine_logits.register_autograd(_backward, setup_context=_setup_context)
