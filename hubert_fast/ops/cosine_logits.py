"""Operator ``cosine_logits``: cosine similarities of frames with label embeddings, as torchaudio lays them out."""

from __future__ import annotations

from typing import List, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.reference import cosine_logits as reference
from hubert_fast.torch_backend import cosine_logits as torch_backend

backend.register(
    "cosine_logits",
    {
        "triton": "norms, products, temperature and -inf in one kernel; two products for the gradients",
        "torch": "normalise, then one matrix product",
        "reference": "cosine_similarity of every frame with every class",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
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
    chosen = backend.choose(
        "cosine_logits", lambda name: cosine_objection(name, "cosine_logits", frames, label_embeddings)
    )
    if chosen == "reference":
        return reference.cosine_logits(frames, label_embeddings, labels)
    return _cosine_logits(frames, label_embeddings, labels, chosen)[0]


def cosine_objection(name: str, operator: str, frames: Tensor, label_embeddings: Tensor) -> backend.Objection:
    return triton_backend.objection(operator, frames, label_embeddings) if name == "triton" else None


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
def _cosine_logits(
    frames: Tensor, label_embeddings: Tensor, labels: Tensor, chosen: str
) -> Tuple[Tensor, List[Tensor]]:
    with without_autocast(frames.device):
        if chosen == "torch":
            return torch_backend.cosine_logits(frames, label_embeddings, labels), []
        from hubert_fast.kernels import cosine_logits as kernels

        return kernels.cosine_logits(frames, label_embeddings, labels)


@_cosine_logits.register_fake
def _(frames, label_embeddings, labels, chosen):
    logits = frames.new_empty(frames.shape[0], 1 + label_embeddings.shape[0])
    if chosen == "torch":
        return logits, []
    from hubert_fast.kernels import cosine_logits as kernels

    shapes = kernels.saved_shapes(frames.shape[0], *label_embeddings.shape)
    return logits, [frames.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


@torch.library.custom_op("hubert_fast::cosine_logits_backward", mutates_args=())
def _cosine_logits_backward(
    grad: Tensor, frames: Tensor, label_embeddings: Tensor, labels: Tensor, saved: List[Tensor], chosen: str
) -> Tuple[Tensor, Tensor]:
    with without_autocast(frames.device):
        if chosen == "torch":
            gradients = torch_backend.cosine_logits_backward(grad, frames, label_embeddings, labels)
            return gradients[0].contiguous(), gradients[1].contiguous()
        from hubert_fast.kernels import cosine_logits as kernels

        return kernels.cosine_logits_backward(grad, frames, label_embeddings, labels, *saved)


@_cosine_logits_backward.register_fake
def _(grad, frames, label_embeddings, labels, saved, chosen):
    return frames.new_empty(frames.shape), label_embeddings.new_empty(label_embeddings.shape)


def _setup_context(ctx, inputs, output) -> None:
    frames, label_embeddings, labels, ctx.chosen = inputs
    _, saved = output
    ctx.set_materialize_grads(False)  # no zeros for what is only saved
    ctx.save_for_backward(frames, label_embeddings, labels, *saved)


def _backward(ctx, grad, _saved_grads):
    if grad is None:
        return None, None, None, None
    frames, label_embeddings, labels, *saved = ctx.saved_tensors
    return *_cosine_logits_backward(grad, frames, label_embeddings, labels, saved, ctx.chosen), None, None


_cosine_logits.register_autograd(_backward, setup_context=_setup_context)
