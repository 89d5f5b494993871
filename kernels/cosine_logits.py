"""Cosine logits in torchaudio's layout, column 0 and the -inf of equal classes included, in one pass; and its backward.

Backward: two products with the gradient of the logits, in which column 0 stands in for the own class, then the gradient of the
norms. The one of the embeddings is added up over splits of the frames whose number follows from the shapes alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.bfloat16_parts import PARTS, add_product, add_product_with_parts, order_for
from hubert_fast.kernels.cosine_scores import (
    TEMPERATURE_CONSTANT,
    Scored,
    class_splits,
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
    from hubert_fast.ops.cosine_logits import Arguments


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [
        (arguments.labels.shape, torch.float32),  # 1 / |frame|
        (parts_shape(*arguments.label_embeddings.shape), torch.bfloat16),  # directions of the classes
        (arguments.label_embeddings.shape[:1], torch.int32),  # classes with equal embeddings
    ]


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    """A label that is no class makes column 0 of its row NaN: the device cannot raise an error."""
    frames = arguments.frames
    scored = Scored(*arguments)
    splits, split_classes = class_splits(scored.classes)
    inverse_norms = scored.empty(scored.rows)
    logits = scored.empty(scored.rows, 1 + scored.classes, dtype=frames.dtype)
    given = scored.arguments | {
        "inverse_norms": inverse_norms,
        "logits": logits,
        "split_classes": split_classes,
        "ORDER": order_for(frames.dtype),
    }
    # The smallest blocks: addresses of what is stored take the registers of larger ones.
    blocks = score_blocks(architecture(frames), scored.frame_parts)[-1:]
    launch(_logits, lambda sizes: (cdiv(scored.rows, sizes["BLOCK_R"]), splits), given, blocks)
    return (logits,), [inverse_norms, scored.parts, scored.groups] if save else []


@triton.jit(do_not_specialize=["rows"])
def _logits(
    frames,  # [rows, DIM]
    labels,  # [rows] int64
    parts,  # [3, padded classes, PADDED_DIM] bfloat16
    groups,  # [classes] int32
    inverse_norms,  # [rows] float32, written
    logits,  # [rows, 1 + classes], written
    rows,
    classes,
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
    """One block of frames with one split of the classes. The split that holds a frame's class writes its column 0."""
    split = tl.program_id(1)
    positions = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = positions < rows
    frame_ids, label = selected_frames(labels, None, positions, rows, classes)
    own_groups = load_groups(groups, label, classes)
    norms = inverse_norms_of(frames, frame_ids, row_stride, DIM, BLOCK_R, BLOCK_K)
    tl.store(inverse_norms + positions, norms, mask=positions < tl.where(split == 0, rows, 0))
    start = split * split_classes
    stop = tl.minimum(start + split_classes, classes)
    row_pointers = logits + positions.to(tl.int64) * (classes + 1)
    positive = tl.zeros([BLOCK_R], tl.float32)
    for first in range(start, stop, BLOCK_C):
        class_ids = first + tl.arange(0, BLOCK_C)
        scores = products(
            frames, frame_ids, row_stride, parts, class_ids, part_stride,
            DIM, PADDED_DIM, FRAME_PARTS, ORDER, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        scores *= (norms / TEMPERATURE_CONSTANT)[:, None]
        positive += tl.sum(tl.where(class_ids[None, :] == label[:, None], scores, 0.0), 1)
        equal = load_groups(groups, class_ids, classes)[None, :] == own_groups[:, None]
        scores = tl.where(equal, float("-inf"), scores).to(logits.dtype.element_ty)
        mask = inside[:, None] & (class_ids[None, :] < classes)
        tl.store(row_pointers[:, None] + 1 + class_ids[None, :], scores, mask=mask)
    known = (label >= 0) & (label < classes)
    positive = tl.where(known, positive, float("nan"))
    holder = tl.where(known, label // split_classes, 0)
    tl.store(row_pointers, positive.to(logits.dtype.element_ty), mask=inside & (holder == split))


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    (grad,), (inverse_norms, parts, groups) = gradients, saved
    scored = Scored(*arguments, parts=parts, groups=groups)
    given = {
        "grad": grad,
        "grad_row_stride": grad.stride(0),
        "grad_column_stride": grad.stride(1),
        **{name: scored.arguments[name] for name in ("labels", "groups", "rows", "classes", "DIM")},
    }
    frames_grad = unit_rows_backward(_frames_gradient(scored, given), scored.frames, 1 / TEMPERATURE)
    directions_grad = _directions_gradient(scored, given, inverse_norms)
    return frames_grad, unit_rows_backward(directions_grad, scored.label_embeddings, 1 / TEMPERATURE)


@functools.cache
def _blocks(arch: int) -> list[Blocks]:
    """BLOCK_R frames, BLOCK_C classes, BLOCK_D columns of a gradient."""
    if arch == INTERPRETER:
        return [Blocks({"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_D": 64})]
    sizes = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_D": 64}
    return [Blocks(sizes, warps=4, stages=2), Blocks(sizes | {"BLOCK_C": 32}, warps=4, stages=2)]


@triton.jit
def _scores_gradient(
    grad, grad_row_stride, grad_column_stride, groups, positions, label, own_groups, class_ids, rows, classes
):
    """[positions, classes]: the gradient of every score, in the dtype of ``grad``."""
    row_pointers = grad + positions.to(tl.int64) * grad_row_stride
    inside = positions < rows
    mask = inside[:, None] & (class_ids[None, :] < classes)
    pointers = row_pointers[:, None] + (1 + class_ids[None, :]) * grad_column_stride
    others = tl.load(pointers, mask=mask, other=0.0)
    positive = tl.load(row_pointers, mask=inside, other=0.0)
    equal = load_groups(groups, class_ids, classes)[None, :] == own_groups[:, None]
    own = class_ids[None, :] == label[:, None]
    return tl.where(own, positive[:, None], tl.where(equal, 0.0, others).to(others.dtype))


def _frames_gradient(scored: Scored, arguments: dict) -> Tensor:
    """[1, frames, dim] float32: the gradient of the frames' directions, times the temperature."""
    result = scored.empty(1, scored.rows, scored.dim)
    padded_dim = scored.parts.shape[2]
    arguments = arguments | {
        "parts": scored.parts,
        "part_stride": scored.parts.stride(0),
        "result": result,
        "PADDED_DIM": padded_dim,
        "GRAD_PARTS": PARTS[arguments["grad"].dtype],
        "ORDER": order_for(scored.frames.dtype),
    }

    def grid(sizes):
        return cdiv(scored.rows, sizes["BLOCK_R"]), cdiv(padded_dim, sizes["BLOCK_D"])

    launch(_frames_gradient_kernel, grid, arguments, _blocks(architecture(scored.frames)))
    return result


@triton.jit(do_not_specialize=["rows"])
def _frames_gradient_kernel(
    grad,  # [rows, 1 + classes]
    labels,  # [rows] int64
    parts,  # [3, padded classes, PADDED_DIM] bfloat16
    groups,  # [classes] int32
    result,  # [rows, DIM] float32, written
    rows,
    classes,
    grad_row_stride,
    grad_column_stride,
    part_stride,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    GRAD_PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BLOCK_D`` columns of a block of frames."""
    positions = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    _, label = selected_frames(labels, None, positions, rows, classes)
    own_groups = load_groups(groups, label, classes)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if classes > 0:  # as there always are: ptxas serialises wgmma where a loop may not run
        for first in range(0, classes, BLOCK_C):
            class_ids = first + tl.arange(0, BLOCK_C)
            scores_grad = _scores_gradient(
                grad,
                grad_row_stride,
                grad_column_stride,
                groups,
                positions,
                label,
                own_groups,
                class_ids,
                rows,
                classes,
            )
            directions = parts + class_ids[:, None] * PADDED_DIM + columns[None, :]
            total = add_product_with_parts(total, scores_grad, directions, part_stride, GRAD_PARTS, ORDER)
    pointers = result + positions.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(pointers, total, mask=(positions[:, None] < rows) & (columns[None, :] < DIM))


def _directions_gradient(scored: Scored, arguments: dict, inverse_norms: Tensor) -> Tensor:
    """[splits, classes, dim] float32: to be added, the gradient of the embeddings' directions, times the temperature."""
    splits, split_rows = row_splits(scored.rows, scored.classes, scored.dim)
    result = scored.empty(splits, scored.classes, scored.dim)
    arguments = arguments | {
        "frames": scored.frames,
        "inverse_norms": inverse_norms,
        "result": result,
        "split_rows": split_rows,
        "row_stride": scored.frames.stride(0),
        "FRAME_PARTS": scored.frame_parts,
        "ORDER": order_for(scored.label_embeddings.dtype),
    }

    def grid(sizes):
        blocks = cdiv(scored.classes, sizes["BLOCK_C"]), cdiv(scored.dim, sizes["BLOCK_D"])
        return *blocks, splits

    launch(_directions_gradient_kernel, grid, arguments, _blocks(architecture(scored.frames)))
    return result


@triton.jit(do_not_specialize=["rows", "split_rows"])
def _directions_gradient_kernel(
    grad,  # [rows, 1 + classes]
    frames,  # [rows, DIM]
    labels,  # [rows] int64
    groups,  # [classes] int32
    inverse_norms,  # [rows] float32
    result,  # [splits, classes, DIM] float32, written
    rows,
    classes,
    split_rows,
    row_stride,
    grad_row_stride,
    grad_column_stride,
    DIM: tl.constexpr,
    FRAME_PARTS: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
        frame_ids, label = selected_frames(labels, None, positions, stop, classes)
        own_groups = load_groups(groups, label, classes)
        scores_grad = _scores_gradient(
            grad, grad_row_stride, grad_column_stride, groups, positions, label, own_groups, class_ids, stop, classes
        )
        scores_grad *= tl.load(inverse_norms + positions, mask=positions < stop, other=0.0)[:, None]
        x = load_frames(frames, frame_ids, row_stride, columns, DIM, BLOCK_D)
        total = add_product(total, tl.trans(scores_grad), x, 3, FRAME_PARTS, ORDER)
    pointers = result + (split.to(tl.int64) * classes + class_ids[:, None]) * DIM + columns[None, :]
    tl.store(pointers, total, mask=(class_ids[:, None] < classes) & (columns[None, :] < DIM))
