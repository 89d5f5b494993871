"""Cosine cross-entropy in chunks of frames: no ``[frames, classes]`` tensor outlives its chunk.

The positive class stands in its own column of the class scores, so column 0 of `cosine_logits` is never built: the loss
is log-sum-exp over the classes (less those that equal the positive one) minus the positive score.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import cpu
from hubert_fast.reference.cosine_logits import TEMPERATURE
from hubert_fast.torch_backend.cosine_logits import Unit, class_groups, fill_equal_, unit_rows, unit_rows_backward

if TYPE_CHECKING:
    from hubert_fast.ops.cosine_cross_entropy import Arguments

_CHUNK_ROWS = 2048


class _Chunk(NamedTuple):
    select: Optional[Tensor]  # which frames, or None for the range
    rows: slice  # where they lie in the selection
    labels: Tensor  # [rows], 0 where the frame does not count
    counted: Tensor  # [rows] bool
    frames: Unit
    scores: Tensor  # [rows, classes], -inf at classes that equal the positive one


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """The log-sum-exp of each selected frame is saved."""
    embeddings = unit_rows(arguments.label_embeddings)
    lse = embeddings.direction.new_empty(_selected(arguments))
    loss = lse.new_zeros(())
    correct = arguments.labels.new_zeros(())
    for chunk in _chunks(arguments, embeddings):
        positive, top = chunk.scores.gather(1, chunk.labels[:, None]).squeeze(1), chunk.scores.amax(1)
        # `logsumexp` would look for the highest scores once more.
        sums = (chunk.scores - top[:, None]).exp_().sum(1).log_().add_(top)
        lse[chunk.rows] = sums
        loss += (sums - positive).where(chunk.counted, 0).sum()
        correct += ((positive >= top) & chunk.counted).sum()
    return (loss, correct), [lse] if save else []


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    dtype = torch.promote_types(arguments.label_embeddings.dtype, torch.float32)
    return [((_selected(arguments),), dtype)]


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    (grad, _), (lse,), frames = gradients, saved, arguments.frames
    embeddings = unit_rows(arguments.label_embeddings)
    fresh = torch.empty_like if arguments.index is None else torch.zeros_like
    frames_grad = fresh(frames, memory_format=torch.contiguous_format)
    direction_grad = torch.zeros_like(embeddings.direction)
    for chunk in _chunks(arguments, embeddings):
        scores_grad = (chunk.scores - lse[chunk.rows, None]).exp_()
        scores_grad.scatter_add_(1, chunk.labels[:, None], torch.full_like(scores_grad[:, :1], -1.0))
        scores_grad.mul_((chunk.counted * (grad / TEMPERATURE))[:, None])
        direction_grad.add_(cpu.product_over_rows(scores_grad, chunk.frames.direction))
        rows_grad = cpu.product_with(scores_grad, embeddings.direction)
        rows_grad = unit_rows_backward(rows_grad, chunk.frames).to(frames.dtype)
        frames_grad[chunk.rows if chunk.select is None else chunk.select] = rows_grad
    embeddings_grad = unit_rows_backward(direction_grad, embeddings)
    return frames_grad, embeddings_grad.to(arguments.label_embeddings.dtype).contiguous()


def _selected(arguments: Arguments) -> int:
    return (arguments.labels if arguments.index is None else arguments.index).shape[0]


def _chunks(arguments: Arguments, embeddings: Unit) -> Iterator[_Chunk]:
    frames, label_embeddings, labels, index = arguments
    groups, selected = class_groups(label_embeddings, embeddings.norm), _selected(arguments)
    for start in range(0, selected, _CHUNK_ROWS):
        rows = slice(start, min(start + _CHUNK_ROWS, selected))
        select = None if index is None else index[rows]
        chunk_labels = labels[rows if select is None else select]
        counted = chunk_labels >= 0
        chunk_labels = chunk_labels.clamp(min=0)
        x = unit_rows(frames[rows if select is None else select])
        scores = cpu.product(x.direction, embeddings.direction, None).div_(TEMPERATURE)
        if groups is not None:
            own = chunk_labels[:, None]
            positive = scores.gather(1, own)
            fill_equal_(scores, chunk_labels, groups, float("-inf")).scatter_(1, own, positive)
        yield _Chunk(select, rows, chunk_labels, counted, x, scores)
