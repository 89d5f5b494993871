"""Which classes have an equal embedding, exactly, without a host synchronisation.

The group of a class is the first class whose embedding equals its own, -0.0 and 0.0 being equal. Candidates are found by a 64-bit
hash of the embedding's bits and then compared number by number, so two embeddings that merely collide stay apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_fast.kernels.launch import INTERPRETER, Blocks, architecture, cdiv, launch


@triton.jit
def hash_of(x, columns):
    """A 64-bit hash along the last axis of ``x`` [rows, columns]; zeros of either sign hash the same."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True).to(tl.int64)
    # Odd multipliers, and products wrap modulo 2^64. Zeros, also those beyond the last column, add nothing.
    mixed = (bits ^ (bits << 29)) * ((2 * columns.to(tl.int64) + 1) * 0x1E3779B97F4A7C15)
    return tl.sum(mixed ^ (mixed >> 31), 1)


def class_groups(
    label_embeddings: Tensor,  # [classes, dim] float32, bfloat16 or float16, columns contiguous
    hashes: Tensor,  # [classes] int64: equal for equal embeddings
) -> Tensor:  # [classes] int32: the first class with an equal embedding
    classes, dim = label_embeddings.shape
    groups = torch.empty(classes, dtype=torch.int32, device=hashes.device)
    arguments = {
        "embeddings": label_embeddings,
        "hashes": hashes,
        "groups": groups,
        "classes": classes,
        "row_stride": label_embeddings.stride(0),
        "DIM": dim,
    }
    small = architecture(hashes) == INTERPRETER
    sizes = {"BLOCK": 16, "CANDIDATES": 16, "BLOCK_D": 16} if small else {"BLOCK": 8, "CANDIDATES": 128, "BLOCK_D": 128}
    launch(_first_equals, lambda sizes: (cdiv(classes, sizes["BLOCK"]),), arguments, [Blocks(sizes)])
    return groups


@triton.jit
def _first_equals(
    embeddings,  # [classes, DIM]
    hashes,  # [classes] int64
    groups,  # [classes] int32
    classes,
    row_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each class tries the classes with its hash in order. The last it can try is itself."""
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = own < classes
    own_hash = tl.load(hashes + own, mask=exists, other=0)
    group = tl.full([BLOCK], -1, tl.int32)
    searching = exists
    while tl.max(searching.to(tl.int32), 0) > 0:
        following = _next_with_hash(hashes, own, own_hash, group, classes, CANDIDATES)
        group = tl.where(searching, following, group)
        same = _equal_rows(embeddings, own, group, searching, row_stride, DIM, BLOCK, BLOCK_D)
        searching = searching & (group < own) & (same == 0)
    tl.store(groups + own, group, mask=exists)


@triton.jit
def _next_with_hash(hashes, own, own_hash, after, classes, CANDIDATES: tl.constexpr):
    """The first class beyond ``after`` with the hash ``own_hash``: at the latest ``own``."""
    found = own
    for first in range(0, classes, CANDIDATES):
        candidates = first + tl.arange(0, CANDIDATES)
        hash = tl.load(hashes + candidates, mask=candidates < classes, other=0)
        suits = (hash[None, :] == own_hash[:, None]) & (candidates[None, :] > after[:, None])
        found = tl.minimum(found, tl.min(tl.where(suits, candidates[None, :], 0x7FFFFFFF), 1))
    return found


@triton.jit
def _equal_rows(
    embeddings, first, second, exists, row_stride, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 where row ``first`` equals row ``second``, else 0."""
    different = tl.zeros([BLOCK], tl.int32)
    for start in range(0, DIM, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = exists[:, None] & (columns[None, :] < DIM)
        a = tl.load(embeddings + first.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
        b = tl.load(embeddings + second.to(tl.int64)[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
        different = tl.maximum(different, tl.max((a.to(tl.float32) != b.to(tl.float32)).to(tl.int32), 1))
    return 1 - different
