"""What the kernels of `cosine_logits` and `cosine_cross_entropy` share: selected frames, their norms, blocks of scores.

A score is the cosine of a frame with a class over the temperature. Frames are multiplied as they are, in their own dtype, and the
product is divided by their norm; label embeddings come as directions in bfloat16 parts (`unit_rows`).
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.bfloat16_parts import PARTS, add_product_with_parts
from hubert_fast.kernels.class_groups import class_groups
from hubert_fast.kernels.launch import INTERPRETER, Blocks, cdiv
from hubert_fast.kernels.unit_rows import contiguous_columns, unit_rows
from hubert_fast.reference.cosine_logits import NORM_MIN, TEMPERATURE

NORM_MIN_CONSTANT = tl.constexpr(NORM_MIN)
TEMPERATURE_CONSTANT = tl.constexpr(TEMPERATURE)

# Classes and frames of a split are multiples of these, whatever the block sizes.
_SPLIT_CLASSES = 128
_SPLIT_ROWS = 64


def class_splits(classes: int) -> tuple[int, int]:
    """(splits, classes of each): a block of frames is shared by several programs, so that few frames fill a GPU."""
    splits = min(4, cdiv(classes, 2 * _SPLIT_CLASSES))
    return splits, cdiv(cdiv(classes, splits), _SPLIT_CLASSES) * _SPLIT_CLASSES


def row_splits(rows: int, classes: int, dim: int) -> tuple[int, int]:
    """(splits, rows of each) of the embeddings' gradient: no more than about 8 MB of partial sums, or two of them."""
    splits = max(1, min(64, (1 << 21) // max(1, classes * dim), cdiv(rows, _SPLIT_ROWS)))
    return splits, max(1, cdiv(cdiv(rows, splits), _SPLIT_ROWS)) * _SPLIT_ROWS


# Block sizes: BLOCK_R frames, BLOCK_C classes, BLOCK_K columns of the products that make scores, BLOCK_D columns of a gradient.
# Frames of more parts take more registers; on Hopper four warps own a block of 64 rows, which is one instruction's.


@functools.cache
def score_blocks(arch: int, frame_parts: int) -> list[Blocks]:
    """For kernels whose results are as wide as a block of classes."""
    if arch == INTERPRETER:
        return [Blocks({"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_K": 64})]
    small = Blocks({"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32}, warps=4, stages=3)
    if arch != 90 or frame_parts > 1:
        return [small]
    return [Blocks({"BLOCK_R": 64, "BLOCK_C": 128, "BLOCK_K": 64}, warps=4, stages=3), small]


@functools.cache
def frames_gradient_blocks(arch: int, frame_parts: int, padded_dim: int) -> list[Blocks]:
    """For kernels that add up over classes."""
    if arch == INTERPRETER:
        return [Blocks({"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_K": 64, "BLOCK_D": 64})]
    sizes = {"BLOCK_R": 64, "BLOCK_C": 32, "BLOCK_K": 32, "BLOCK_D": _columns_at_once(padded_dim)}
    small = Blocks(sizes, warps=4, stages=2)
    if arch == 100:
        return [Blocks(sizes | {"BLOCK_C": 64, "BLOCK_K": 64}, warps=8, stages=2), small]
    if arch == 90 and frame_parts == 1:
        return [Blocks(sizes | {"BLOCK_K": 64}, warps=4, stages=2), small]
    return [small]


@functools.cache
def directions_gradient_blocks(arch: int, frame_parts: int, padded_dim: int) -> list[Blocks]:
    """For kernels that add up over frames."""
    if arch == INTERPRETER:
        return [Blocks({"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_K": 64, "BLOCK_D": 64})]
    small = Blocks({"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 32, "BLOCK_D": 64}, warps=4, stages=2)
    if frame_parts == 3:
        return [small]
    sizes = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_D": _columns_at_once(padded_dim)}
    if arch == 90:
        return [Blocks(sizes | {"BLOCK_K": 64 if frame_parts == 1 else 32}, warps=4, stages=2), small]
    return [Blocks(sizes, warps=8, stages=2), small]


def _columns_at_once(padded_dim: int) -> int:
    return 128 if padded_dim % 128 == 0 else 64


class Scored:
    """Arguments that every kernel on scores takes, made from tensors of any strides."""

    def __init__(
        self,
        frames: Tensor,  # [frames, dim] float32, bfloat16 or float16
        label_embeddings: Tensor,  # [classes, dim] likewise
        labels: Tensor,  # [frames] int64
        index: Optional[Tensor] = None,  # [selected] int64
        parts: Optional[Tensor] = None,  # of the embeddings, where they are known
        groups: Optional[Tensor] = None,
    ) -> None:
        self.frames, self.label_embeddings = contiguous_columns(frames), contiguous_columns(label_embeddings)
        if parts is None or groups is None:
            parts, hashes = unit_rows(self.label_embeddings)
            groups = class_groups(self.label_embeddings, hashes)
        self.parts, self.groups = parts, groups
        self.index = None if index is None else index.contiguous()
        self.frame_parts = PARTS[frames.dtype]
        self.rows = len(labels) if index is None else len(index)
        self.classes, self.dim = label_embeddings.shape
        self.arguments = {
            "frames": self.frames,
            "labels": labels.contiguous(),
            "parts": parts,
            "groups": groups,
            "rows": self.rows,
            "classes": self.classes,
            "row_stride": self.frames.stride(0),
            "part_stride": parts.stride(0),
            "DIM": self.dim,
            "PADDED_DIM": parts.shape[2],
            "FRAME_PARTS": self.frame_parts,
        }

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.frames.device)


@triton.jit
def selected_frames(labels, index, positions, stop, classes):
    """(frame, label) of the selected positions before ``stop``.

    The label is -1 beyond it and where a frame is left out, and one that no block of classes reaches where it is no class.
    """
    inside = positions < stop
    if index is None:
        frame_ids = tl.where(inside, positions, 0)
    else:
        frame_ids = tl.load(index + positions, mask=inside, other=0).to(tl.int32)
    label = tl.load(labels + frame_ids, mask=inside, other=-1)
    return frame_ids, tl.where(label < classes, label, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def load_frames(frames, frame_ids, row_stride, columns, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of frames. Rows are not masked: frame 0 stands in for those that are not there."""
    pointers = frames + frame_ids.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if DIM % BLOCK == 0:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=columns[None, :] < DIM, other=0.0)
    return x


@triton.jit
def inverse_norms_of(frames, frame_ids, row_stride, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / max(|x|, 1e-8) of each frame."""
    squares = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, DIM, BLOCK_K):
        x = load_frames(frames, frame_ids, row_stride, first + tl.arange(0, BLOCK_K), DIM, BLOCK_K).to(tl.float32)
        squares += tl.sum(x * x, 1)
    return tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), tl.maximum(tl.sqrt_rn(squares), NORM_MIN_CONSTANT))


@triton.jit
def products(
    frames, frame_ids, row_stride, parts, class_ids, part_stride,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, FRAME_PARTS: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C]: frames times the directions of classes."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, PADDED_DIM, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        x = load_frames(frames, frame_ids, row_stride, columns, DIM, BLOCK_K)
        directions = parts + class_ids[None, :] * PADDED_DIM + columns[:, None]
        total = add_product_with_parts(total, x, directions, part_stride, FRAME_PARTS, ORDER)
    return total


@triton.jit
def load_groups(groups, class_ids, classes):
    """The group of each class; -1 for none, which is the group of no class."""
    return tl.load(groups + class_ids, mask=(class_ids >= 0) & (class_ids < classes), other=-1)
