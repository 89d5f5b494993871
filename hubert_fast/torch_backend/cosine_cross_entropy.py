"""Cosine cross-entropy in chunks of frames: no ``[frames, classes]`` tensor outlives its chunk.

The positive class stands in its own column of the class scores, so column 0 of `cosine_logits` is never built: the loss
is log-sum-exp over the classes (less those that equal the positive one) minus the positive score.

Gradients are made in the forward, where a chunk's scores are at hand: the loss is a scalar, so its own gradient only scales them.
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
    """Gradients of a loss whose own gradient is 1 are saved: those of the selected frames, and of the embeddings."""
    groups, embeddings = class_groups(arguments.label_embeddings), unit_rows(arguments.label_embeddings)
    # Of no frame one chunk too: there is a loss of 0.
    starts = range(0, max(_selected(arguments), 1), _CHUNK_ROWS)
    chunks = (slice(start, start + _CHUNK_ROWS) for start in starts)
    losses, correct, *gradients = zip(*(_chunk(arguments, rows, embeddings, groups, save) for rows in chunks))
    results = _total(losses), _total(correct)
    if not save:
        return results, []
    frames_grads, direction_grads = gradients
    frames_grad = frames_grads[0] if len(frames_grads) == 1 else torch.cat(frames_grads)
    return results, [frames_grad, unit_rows_backward(_total(direction_grads), embeddings)]


def _chunk(
    arguments: Arguments, rows: slice, embeddings: Unit, groups: Optional[Tensor], save: bool
) -> tuple[Tensor, ...]:
    """Of the selected frames in ``rows``: loss, how many are right; with ``save`` the gradients of frames and directions."""
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
    if not save:
        return loss, correct
    scores_grad = log_shares.exp_()
    scores_grad.scatter_add_(1, own, scores_grad.new_full((), -1.0).expand_as(own)).mul_(counted / TEMPERATURE)
    frames_grad = unit_rows_backward(cpu.product_with(scores_grad, embeddings.direction), x)
    return loss, correct, frames_grad, cpu.product_over_rows(scores_grad, x.direction)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


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
        # Not `zeros_like`: the frames may be a view.
        frames_grad = frames.new_zeros(frames.shape).index_copy_(0, index, frames_grad)
    return frames_grad, embeddings_grad.to(label_embeddings.dtype)


def _selected(arguments: Arguments) -> int:
    return (arguments.labels if arguments.index is None else arguments.index).shape[0]
