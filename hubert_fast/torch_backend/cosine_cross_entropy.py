"""Cosine cross-entropy in chunks of frames: no ``[frames, classes]`` tensor outlives its chunk.

The positive class stands in its own column of the class scores, so column 0 of `cosine_logits` is never built: the loss
is log-sum-exp over the classes (less those that equal the positive one) minus the positive score.

Gradients are made in the forward, where a chunk's scores are at hand: the loss is a scalar, so its own gradient only scales them.
They are saved, [selected, dim] and [classes, dim] in float32 or wider. With gradients on, a loss that nobody differentiates pays
for them all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast import cpu
from hubert_fast.reference.cosine_logits import TEMPERATURE
from hubert_fast.torch_backend.cosine_logits import Unit, class_groups, fill_equal_, unit_rows, unit_rows_backward

if TYPE_CHECKING:
    from hubert_fast.ops.cosine_cross_entropy import Arguments

_CHUNK_ROWS = 2048


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Loss and count; saved are the gradients of the loss with respect to the selected frames and to the embeddings."""
    groups, embeddings = class_groups(arguments.label_embeddings), unit_rows(arguments.label_embeddings)
    selected, dim = _selected(arguments), arguments.frames.shape[1]
    frames_grad = embeddings.direction.new_empty(selected, dim) if save else None
    totals: Sequence[Tensor] = ()
    for start in range(0, max(selected, 1), _CHUNK_ROWS):  # no frame is one chunk too, whose loss is 0
        parts = _chunk(arguments, slice(start, start + _CHUNK_ROWS), embeddings, groups, frames_grad)
        totals = [total.add_(part) for total, part in zip(totals, parts)] or parts
    loss, correct, *direction_grad = totals
    return (loss, correct), [frames_grad, unit_rows_backward(*direction_grad, embeddings)] if save else []


def _chunk(
    arguments: Arguments, rows: slice, embeddings: Unit, groups: Optional[Tensor], frames_grad: Optional[Tensor]
) -> tuple[Tensor, ...]:
    """(loss, correct frames) of the selected frames in ``rows``, and where ``frames_grad`` is to be filled in, the gradient with
    respect to the directions of the embeddings.
    """
    frames, _, labels, index = arguments
    chosen, own = (each[rows] if index is None else each.index_select(0, index[rows]) for each in (frames, labels))
    counted, own = own >= 0, own.clamp(min=0)[:, None]
    x = unit_rows(chosen)
    scores = cpu.product(x.direction, embeddings.direction, None).div_(TEMPERATURE)
    positive = scores.gather(1, own)
    if groups is not None:
        fill_equal_(scores, own.squeeze(1), groups, float("-inf")).scatter_(1, own, positive)
    log_shares, counted = scores.log_softmax(1), counted[:, None]
    loss = log_shares.gather(1, own).neg_().where(counted, 0).sum()
    correct = ((positive >= scores.amax(1, keepdim=True)) & counted).sum()
    if frames_grad is None:
        return loss, correct
    scores_grad = log_shares.exp_()
    scores_grad.scatter_add_(1, own, scores_grad.new_full((), -1.0).expand_as(own)).mul_(counted / TEMPERATURE)
    frames_grad[rows] = unit_rows_backward(cpu.product_with(scores_grad, embeddings.direction), x)
    return loss, correct, cpu.product_over_rows(scores_grad, x.direction)


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    dtype, dim = torch.promote_types(arguments.label_embeddings.dtype, torch.float32), arguments.frames.shape[1]
    return [((_selected(arguments), dim), dtype), (tuple(arguments.label_embeddings.shape), dtype)]


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    frames, label_embeddings, _, index = arguments
    frames_grad, embeddings_grad = (each * gradients[0] for each in saved)
    frames_grad = frames_grad.to(frames.dtype)
    if index is not None:
        # Not `zeros_like`: frames that are a transpose would have a gradient that is one.
        frames_grad = frames.new_zeros(frames.shape).index_copy_(0, index, frames_grad)
    return frames_grad, embeddings_grad.to(label_embeddings.dtype)


def _selected(arguments: Arguments) -> int:
    return (arguments.labels if arguments.index is None else arguments.index).shape[0]
