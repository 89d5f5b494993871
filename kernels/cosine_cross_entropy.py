"""Cosine cross-entropy without logits: scores live in registers, a block of frames by a block of classes at a time.

Forward: sums of exponentials, greatest and own score of each frame (`_partial_sums`), then loss and count (`_finish`). Scores lie
within 1 / temperature of 0, so no maximum has to be taken out of their exponentials: float32 holds e^10 times any number of
classes. Backward: both gradients compute the scores again. The one of the frames is scattered to their rows; that of the
embeddings is added up over splits of the frames whose number follows from the shapes alone, so its bits are the same every time.
Powers are of 2: scores carry a factor log2(e).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.bfloat16_parts import add_product, add_product_with_parts, order_for
from hubert_fast.kernels.cosine_scores import (
    TEMPERATURE_CONSTANT,
    Scored,
    class_splits,
    directions_gradient_blocks,
    frames_gradient_blocks,
    inverse_norms_of,
    load_frames,
    load_groups,
    products,
    row_splits,
    score_blocks,
    selected_frames,
)
from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch
from hubert_fast.kernels.unit_rows import parts_shape, unit_rows_backward
from hubert_fast.reference.cosine_logits import TEMPERATURE

if TYPE_CHECKING:
    from hubert_fast.ops.cosine_cross_entropy import Arguments

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# The score of a class that is left out: its power is 0, and so is its product with that power.
_EXCLUDED = tl.constexpr(-10000.0)
# Frames that one program adds up: three minutes of audio have 4,021 masked ones. More are added in parts.
_FINISH_ROWS = 4096


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    rows = (arguments.labels if arguments.index is None else arguments.index).shape
    return [
        (rows, torch.float32),  # base-2 log of the sum of exponentials; infinity where a frame is left out
        (rows, torch.float32),  # 1 / |frame|
        (parts_shape(*arguments.label_embeddings.shape), torch.bfloat16),  # directions of the classes
        (arguments.label_embeddings.shape[:1], torch.int32),  # classes with equal embeddings
    ]


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """A label that is no class makes the loss infinite: the device cannot raise an error."""
    scored = Scored(*arguments)
    rows = scored.rows
    splits, split_classes = class_splits(scored.classes)
    inverse_norms = scored.empty(rows)
    partial = scored.empty(3, splits, rows)
    given = scored.arguments | {
        "index": scored.index,
        "inverse_norms": inverse_norms,
        "partial": partial,
        "split_classes": split_classes,
        "splits": splits,
        "ORDER": 3,
    }
    blocks = score_blocks(architecture(scored.frames), scored.frame_parts)
    launch(_partial_sums, lambda sizes: (cdiv(rows, sizes["BLOCK_R"]), splits), given, blocks)
    block = 64 if architecture(scored.frames) == INTERPRETER else _FINISH_ROWS
    parts = max(1, cdiv(rows, block))
    shape = (parts,) if parts > 1 else ()
    loss, correct = scored.empty(*shape), scored.empty(*shape, dtype=torch.int64)
    lse = scored.empty(rows)
    given = {
        "partial": partial,
        "labels": scored.arguments["labels"],
        "index": scored.index,
        "lse": lse,
        "loss": loss,
        "correct": correct,
        "rows": rows,
        "classes": scored.classes,
        "splits": splits,
        "BLOCK": block,
    }
    launch(_finish, lambda _: (parts,), given, [Blocks(warps=32)])
    if parts > 1:
        loss, correct = loss.sum(), correct.sum()
    return (loss, correct), [lse, inverse_norms, scored.parts, scored.groups] if save else []


@triton.jit
def _scores(
    frames, frame_ids, labels, inverse_norms, own_groups, row_stride, parts, groups, class_ids, classes, part_stride,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, FRAME_PARTS: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(base-2 scores, whether the class is the frame's own), [BLOCK_R, BLOCK_C] each. Own is never left out."""
    scores = products(
        frames, frame_ids, row_stride, parts, class_ids, part_stride,
        DIM, PADDED_DIM, FRAME_PARTS, ORDER, BLOCK_R, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    scores *= (inverse_norms * (_LOG2E / TEMPERATURE_CONSTANT))[:, None]
    own = class_ids[None, :] == labels[:, None]
    equal = load_groups(groups, class_ids, classes)[None, :] == own_groups[:, None]
    left_out = (equal & (own == 0)) | (class_ids[None, :] >= classes)
    return tl.where(left_out, _EXCLUDED, scores), own


@triton.jit(do_not_specialize=["rows"])
def _partial_sums(
    frames,  # [frames, DIM]
    labels,  # [frames] int64
    index,  # [rows] int64 or None
    parts,  # [3, padded classes, PADDED_DIM] bfloat16
    groups,  # [classes] int32
    inverse_norms,  # [rows] float32, written
    partial,  # [3, splits, rows] float32, written: sums of exponentials, greatest scores, own scores
    rows,
    classes,
    splits,
    split_classes,
    row_stride,
    part_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    FRAME_PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of frames with one split of the classes. A block without a frame that counts does nothing."""
    split = tl.program_id(1)
    positions = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = positions < rows
    frame_ids, label = selected_frames(labels, index, positions, rows, classes)
    own_groups = load_groups(groups, label, classes)
    norms = inverse_norms_of(frames, frame_ids, row_stride, DIM, BLOCK_R, BLOCK_K)
    tl.store(inverse_norms + positions, norms, mask=positions < tl.where(split == 0, rows, 0))
    start = split * split_classes
    stop = tl.where(tl.max(label, 0) >= 0, tl.minimum(start + split_classes, classes), start)
    sums = tl.zeros([BLOCK_R], tl.float32)
    greatest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    positive = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK_C):
        scores, own = _scores(
            frames, frame_ids, label, norms, own_groups, row_stride, parts, groups, first + tl.arange(0, BLOCK_C),
            classes, part_stride, DIM, PADDED_DIM, FRAME_PARTS, ORDER, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        sums += tl.sum(tl.exp2(scores), 1)
        greatest = tl.maximum(greatest, tl.max(scores, 1))
        positive = tl.maximum(positive, tl.max(tl.where(own, scores, float("-inf")), 1))
    pointers = partial + split * rows + positions
    kind_stride = splits * rows
    tl.store(pointers, sums, mask=inside)
    tl.store(pointers + kind_stride, greatest, mask=inside)
    tl.store(pointers + 2 * kind_stride, positive, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def _finish(
    partial,  # [3, splits, rows] float32
    labels,  # [frames] int64
    index,  # [rows] int64 or None
    lse,  # [rows] float32, written
    loss,  # [programs] float32, written
    correct,  # [programs] int64, written
    rows,
    classes,
    splits,
    BLOCK: tl.constexpr,
):
    """A program adds up a few numbers of each of BLOCK frames."""
    kind_stride = splits * rows
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < rows
    _, label = selected_frames(labels, index, positions, rows, classes)
    sums = tl.zeros([BLOCK], tl.float32)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    positive = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(0, splits):
        pointers = partial + split * rows + positions
        sums += tl.load(pointers, mask=inside, other=0.0)
        greatest = tl.maximum(greatest, tl.load(pointers + kind_stride, mask=inside, other=0.0))
        positive = tl.maximum(positive, tl.load(pointers + 2 * kind_stride, mask=inside, other=0.0))
    counted = label >= 0
    sums = tl.where(counted, tl.log2(tl.where(counted, sums, 1.0)), float("inf"))
    tl.store(lse + positions, sums, mask=inside)
    losses = tl.where(counted, sums - positive, 0.0)
    hits = (counted & (positive >= greatest)).to(tl.int64)
    tl.store(loss + tl.program_id(0), tl.sum(losses, 0) * _LN2)
    tl.store(correct + tl.program_id(0), tl.sum(hits, 0))


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Optional[Tensor], ...], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    (grad, _), (lse, inverse_norms, parts, groups) = gradients, saved
    scored = Scored(*arguments, parts, groups)
    given = scored.arguments | {"index": scored.index, "inverse_norms": inverse_norms, "lse": lse}
    frames_grad = _frames_gradient(scored, given, grad, arguments.frames)
    directions_grad = _directions_gradient(scored, given, order_for(arguments.label_embeddings.dtype))
    return frames_grad, unit_rows_backward(directions_grad, scored.label_embeddings, 1 / TEMPERATURE, grad)


def _frames_gradient(scored: Scored, arguments: dict, grad: Tensor, frames: Tensor) -> Tensor:
    make = torch.empty if scored.index is None else torch.zeros
    result = make(frames.shape, dtype=frames.dtype, device=frames.device)
    arguments = arguments | {"grad": grad, "result": result, "ORDER": order_for(frames.dtype)}
    padded_dim = scored.parts.shape[2]
    launch(
        _frames_gradient_kernel,
        lambda sizes: (cdiv(scored.rows, sizes["BLOCK_R"]), cdiv(padded_dim, sizes["BLOCK_D"])),
        arguments,
        frames_gradient_blocks(architecture(frames), scored.frame_parts, padded_dim),
    )
    return result


@triton.jit(do_not_specialize=["rows"])
def _frames_gradient_kernel(
    frames,  # [frames, DIM]
    labels,  # [frames] int64
    index,  # [rows] int64 or None
    parts,  # [3, padded classes, PADDED_DIM] bfloat16
    groups,  # [classes] int32
    inverse_norms,  # [rows] float32
    lse,  # [rows] float32
    grad,  # [] of the loss
    result,  # [frames, DIM], written at the selected rows
    rows,
    classes,
    row_stride,
    part_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    FRAME_PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BLOCK_D`` columns of a block of frames.

    The component along the frame, which the norm takes out, is the sum of score gradients times scores: no other columns are
    needed.
    """
    positions = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = positions < rows
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    frame_ids, label = selected_frames(labels, index, positions, rows, classes)
    own_groups = load_groups(groups, label, classes)
    norms = tl.load(inverse_norms + positions, mask=inside, other=0.0)
    log_sums = tl.load(lse + positions, mask=inside, other=float("inf"))
    stop = tl.where(tl.max(label, 0) >= 0, classes, 0)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    along = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, stop, BLOCK_C):
        class_ids = first + tl.arange(0, BLOCK_C)
        scores, own = _scores(
            frames, frame_ids, label, norms, own_groups, row_stride, parts, groups, class_ids,
            classes, part_stride, DIM, PADDED_DIM, FRAME_PARTS, ORDER, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        scores_grad = tl.exp2(scores - log_sums[:, None]) - own.to(tl.float32)
        along += tl.sum(scores_grad * scores, 1)
        directions = parts + first * PADDED_DIM + (tl.arange(0, BLOCK_C)[:, None] * PADDED_DIM + columns[None, :])
        total = add_product_with_parts(total, scores_grad, directions, part_stride, 3, ORDER)
    x = load_frames(frames, frame_ids, row_stride, columns, DIM, BLOCK_D).to(tl.float32)
    total -= x * (norms * along * (TEMPERATURE_CONSTANT * _LN2))[:, None]
    total *= (norms * (tl.load(grad).to(tl.float32) / TEMPERATURE_CONSTANT))[:, None]
    pointers = result + frame_ids.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(pointers, total.to(result.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < DIM))


def _directions_gradient(scored: Scored, arguments: dict, order: int) -> Tensor:
    """[splits, classes, dim] float32: to be added, and to be multiplied by the gradient of the loss over the temperature."""
    splits, split_rows = row_splits(scored.rows, scored.classes, scored.dim)
    result = scored.empty(splits, scored.classes, scored.dim)
    arguments = arguments | {"result": result, "split_rows": split_rows, "ORDER": order}
    padded_dim = scored.parts.shape[2]

    def grid(sizes):
        blocks = cdiv(scored.classes, sizes["BLOCK_C"]), cdiv(padded_dim, sizes["BLOCK_D"])
        return *blocks, splits

    blocks = directions_gradient_blocks(architecture(scored.frames), scored.frame_parts, padded_dim)
    launch(_directions_gradient_kernel, grid, arguments, blocks)
    return result


@triton.jit(do_not_specialize=["rows", "split_rows"])
def _directions_gradient_kernel(
    frames,  # [frames, DIM]
    labels,  # [frames] int64
    index,  # [rows] int64 or None
    parts,  # [3, padded classes, PADDED_DIM] bfloat16
    groups,  # [classes] int32
    inverse_norms,  # [rows] float32
    lse,  # [rows] float32
    result,  # [splits, classes, DIM] float32, written
    rows,
    classes,
    split_rows,
    row_stride,
    part_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    FRAME_PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BLOCK_D`` columns of a block of classes, summed over one split of the frames."""
    class_ids = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, rows)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_R):
        positions = first + tl.arange(0, BLOCK_R)
        inside = positions < stop
        frame_ids, label = selected_frames(labels, index, positions, stop, classes)
        own_groups = load_groups(groups, label, classes)
        norms = tl.load(inverse_norms + positions, mask=inside, other=0.0)
        log_sums = tl.load(lse + positions, mask=inside, other=float("inf"))
        scores, own = _scores(
            frames, frame_ids, label, norms, own_groups, row_stride, parts, groups, class_ids,
            classes, part_stride, DIM, PADDED_DIM, FRAME_PARTS, ORDER, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        scores_grad = (tl.exp2(scores - log_sums[:, None]) - own.to(tl.float32)) * norms[:, None]
        x = load_frames(frames, frame_ids, row_stride, columns, DIM, BLOCK_D)
        total = add_product(total, tl.trans(scores_grad), x, 3, FRAME_PARTS, ORDER)
    pointers = result + (split.to(tl.int64) * classes + class_ids[:, None]) * DIM + columns[None, :]
    tl.store(pointers, total, mask=(class_ids[:, None] < classes) & (columns[None, :] < DIM))
