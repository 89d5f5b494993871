"""The dropout masks of fused operators: regenerated from a seed, never stored, all at once or a chunk of rows at a time.

A seed starts a generator of its own, so the mask depends on nothing else, and forward and backward draw the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.exporters import is_exporting

_LEVELS = 1 << 16

# Elements of a chunk for each thread: what a few passes read and write of it stays in the core's cache.
_CHUNK_ELEMENTS = 1 << 19

# Seed XOR this: another mask of the same seed.
SECOND_MASK = 0x2545F4914F6CDD1D


class Kept(NamedTuple):
    """The mask of a dropout, and the factor of the values that it keeps."""

    mask: Tensor  # [rows, channels] bool: True is kept
    scale: float


def keep_threshold(p: float) -> int:
    """A 16-bit draw below this is dropped: ``p`` to within 2^-16, and always less than 1."""
    return min(round(p * _LEVELS), _LEVELS - 1)


def keep_scale(p: float) -> float:
    """What kept values are multiplied by, so that the expectation is exactly unchanged."""
    return _LEVELS / (_LEVELS - keep_threshold(p))


def keep_mask(generator: torch.Generator, groups: int, numel: int, p: float) -> Tensor:
    """Bool ``[groups, numel]`` on the CPU, True with probability ``1 - p``, drawn group after group.

    Four 16-bit draws come from each 64-bit number; a group starts on a number of its own, so the groups may be drawn
    together or one at a time.
    """
    numbers = torch.empty(groups, -(-numel // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return (numbers.view(torch.int16) >= keep_threshold(p) - (_LEVELS >> 1))[:, :numel]


def dropped(x: Tensor, kept: Optional[Kept]) -> Tensor:
    """``x`` (``[rows, channels]``) after dropout; ``x`` itself where nothing is dropped."""
    return x if kept is None else (x * kept.mask).mul_(kept.scale)


def row_chunks(x: Tensor) -> list[slice]:
    """Rows of ``x`` ([rows, channels]) that passes take together: few on a CPU, all on a device, where launches cost."""
    rows, channels = x.shape
    if x.device.type != "cpu":
        return [slice(0, rows)]
    size = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // max(1, channels))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def kept_chunks(
    seed: Optional[Tensor],  # [] int64
    chunks: Sequence[slice],
    channels: int,
    p: float,
) -> Iterator[Optional[Tensor]]:
    """For each chunk what dropout keeps, bool ``[rows, channels]`` on the seed's device; None where ``p`` is 0.

    The mask depends on the seed alone, not on the chunks. On a CPU the seed is read; elsewhere, and in an exported program,
    the host does not wait for it.
    """
    if p == 0.0:
        yield from [None] * len(chunks)
    elif seed.device.type == "cpu" and not is_exporting():  # no program starts a generator
        generator = torch.Generator().manual_seed(int(seed))
        for rows in chunks:
            yield keep_mask(generator, rows.stop - rows.start, channels, p)
    else:
        for rows in chunks:
            yield _hashed_mask(seed, rows, channels, p)


def kept_values(seed: Optional[Tensor], rows: int, channels: int, p: float) -> Optional[Kept]:
    """The mask of all rows, and its scale; None where ``p`` is 0."""
    return None if p == 0.0 else Kept(next(kept_chunks(seed, [slice(0, rows)], channels, p)), keep_scale(p))


def _hashed_mask(seed: Tensor, rows: slice, channels: int, p: float) -> Tensor:
    """Without a generator: each element's number through SplitMix64's mixing function (Steele et al. 2014)."""
    bits = torch.arange(rows.start * channels, rows.stop * channels, device=seed.device)
    bits.mul_(0x9E3779B97F4A7C15 - (1 << 64)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits.bitwise_xor_((bits >> shift) & ((1 << (64 - shift)) - 1)).mul_(factor - (1 << 64))
    return ((bits >> 48) >= keep_threshold(p) - (1 << 15)).view(-1, channels)


def drop_(x: Tensor, kept: Optional[Tensor], scale: float) -> Tensor:
    """Dropout of ``x`` in place."""
    return x if kept is None else x.mul_(kept).mul_(scale)
