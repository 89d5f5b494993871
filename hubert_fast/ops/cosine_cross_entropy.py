"""Operator ``cosine_cross_entropy``: HuBERT's masked-prediction loss straight from projected frames, without logits."""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.ops.cosine_logits import check_cosine_arguments, cosine_objection
from hubert_fast.reference import cosine_cross_entropy as reference
from hubert_fast.torch_backend import cosine_cross_entropy as torch_backend

_NAME = "cosine_cross_entropy"

backend.register(
    _NAME,
    {
        "triton": "scores in registers, forward and backward; norms, selection and count in the same kernels",
        "torch": "normalise and multiply in chunks of frames, recomputed in the backward",
        "reference": "cosine_logits, then log-sum-exp",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
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
    chosen = backend.choose(_NAME, lambda name: cosine_objection(name, _NAME, frames, label_embeddings))
    if chosen == "reference":
        return reference.cosine_cross_entropy(frames, label_embeddings, labels, index)
    loss, correct, _ = _cosine_cross_entropy(frames, label_embeddings, labels, index, chosen)
    return loss, correct


@torch.library.custom_op("hubert_fast::cosine_cross_entropy", mutates_args=())
def _cosine_cross_entropy(
    frames: Tensor, label_embeddings: Tensor, labels: Tensor, index: Optional[Tensor], chosen: str
) -> Tuple[Tensor, Tensor, List[Tensor]]:
    with without_autocast(frames.device):
        if chosen == "torch":
            loss, correct, lse = torch_backend.cosine_cross_entropy(frames, label_embeddings, labels, index)
            return loss, correct, [lse]
        from hubert_fast.kernels import cosine_cross_entropy as kernels

        return kernels.cosine_cross_entropy(frames, label_embeddings, labels, index)


@_cosine_cross_entropy.register_fake
def _(frames, label_embeddings, labels, index, chosen):
    dtype = torch.promote_types(label_embeddings.dtype, torch.float32)
    selected = labels.shape[0] if index is None else index.shape[0]
    shapes = [((selected,), dtype)]
    if chosen == "triton":
        from hubert_fast.kernels import cosine_cross_entropy as kernels

        shapes = kernels.saved_shapes(selected, *label_embeddings.shape)
    saved = [frames.new_empty(shape, dtype=each) for shape, each in shapes]
    return frames.new_empty((), dtype=dtype), labels.new_empty(()), saved


@torch.library.custom_op("hubert_fast::cosine_cross_entropy_backward", mutates_args=())
def _cosine_cross_entropy_backward(
    grad: Tensor,
    frames: Tensor,
    label_embeddings: Tensor,
    labels: Tensor,
    index: Optional[Tensor],
    saved: List[Tensor],
    chosen: str,
) -> Tuple[Tensor, Tensor]:
    with without_autocast(frames.device):
        if chosen == "torch":
            inputs = frames, label_embeddings, labels, index
            gradients = torch_backend.cosine_cross_entropy_backward(grad, *inputs, *saved)
            return gradients[0].contiguous(), gradients[1].contiguous()
        from hubert_fast.kernels import cosine_cross_entropy as kernels

        return kernels.cosine_cross_entropy_backward(grad, frames, label_embeddings, labels, index, *saved)


@_cosine_cross_entropy_backward.register_fake
def _(grad, frames, label_embeddings, labels, index, saved, chosen):
    return frames.new_empty(frames.shape), label_embeddings.new_empty(label_embeddings.shape)


def _setup_context(ctx, inputs, output) -> None:
    frames, label_embeddings, labels, index, ctx.chosen = inputs
    ctx.set_materialize_grads(False)  # no zeros for what is only saved
    ctx.save_for_backward(frames, label_embeddings, labels, index, *output[2])


def _backward(ctx, grad, _correct_grad, _saved_grads):
    if grad is None:
        return None, None, None, None, None
    frames, label_embeddings, labels, index, *saved = ctx.saved_tensors
    inputs = frames, label_embeddings, labels, index
    return *_cosine_cross_entropy_backward(grad, *inputs, saved, ctx.chosen), None, None, None


_cosine_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
