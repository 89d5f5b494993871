"""Rows: the frames of a batch as one ``[rows, channels]`` matrix, with or without the padding.

Padded frames never influence valid ones (they are 0 before the positional convolution and are no keys after it), so all that
follows the positional convolution may leave them out.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.ops.host_tensors import may_decide_shapes, to_device


class Rows(NamedTuple):
    """Where the rows lie in the ``[batch, frames]`` grid."""

    batch: int
    frames: int
    index: Optional[Tensor]  # [rows] int64: position of each row in the flattened grid; None: the whole grid
    offsets: Tensor  # [batch + 1] int64: rows offsets[i] : offsets[i + 1] are those of sequence i; rows beyond are dead
    key_lengths: Optional[Tensor]  # [batch] int64: valid rows at the head of each sequence; None: all
    host_index: Optional[Tensor] = None  # index, on the CPU
    # [batch + 1] int64, where the last layer gives the rows ``keep`` alone: keep[kept_offsets[i] : kept_offsets[i + 1]] are those
    # of sequence i, and fillers follow, of which attention gives 0. None: ``keep`` may name any rows, in any order.
    kept_offsets: Optional[Tensor] = None
    mask: Optional[Tensor] = None  # [batch, 1, frames, frames]: added to the scores, of the whole grid

    def lengths(self) -> Optional[Tensor]:
        """Valid frames of each sequence: ``[batch]`` int64; None: all."""
        return self.key_lengths if self.index is None else self.offsets.diff()

    def padding(self) -> Optional[Tensor]:
        """Which rows are padding, ``[rows]`` bool; None where none is."""
        return None if self.key_lengths is None else self.padding_mask().flatten()

    def padding_mask(self) -> Optional[Tensor]:
        """True at frames of the grid that are padding: ``[batch, frames]`` bool; None where none is."""
        lengths = self.lengths()
        return None if lengths is None else padding_mask(lengths, self.frames)

    def key_mask(self) -> Optional[Tensor]:
        """The keys of a whole grid, valid frames of each sequence: ``[batch, 1, frames, frames]`` bool; None where all are.

        All queries have the same, but ONNX's attention does not broadcast them.
        """
        padding = self.padding()
        if padding is None:
            return None
        return ~padding.view(self.batch, 1, 1, self.frames).expand(-1, -1, self.frames, -1)

    def sequence(self, device: torch.device) -> Tensor:
        """The sequence each row belongs to: ``[rows]`` int64."""
        positions = torch.arange(self.batch * self.frames, device=device) if self.index is None else self.index
        return torch.div(positions, self.frames, rounding_mode="floor")

    def pack(self, grid: Tensor) -> Tensor:
        """``[batch, frames, ...]`` to ``[rows, ...]``."""
        flat = grid.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """``[rows, ...]`` to ``[batch, frames, ...]``, with 0 where there is no row."""
        if self.index is not None:
            grid = rows.new_zeros(self.batch * self.frames, *rows.shape[1:])
            live = torch.arange(len(rows), device=rows.device) < self.offsets[-1].to(rows.device)
            rows = rows.where(live.view(-1, *[1] * (rows.ndim - 1)), rows.new_zeros(()))
            rows = grid.index_copy(0, self.index, rows)
        elif (padding := self.padding()) is not None:
            rows = rows.masked_fill(padding.view(-1, *[1] * (rows.ndim - 1)), 0)
        return rows.reshape(self.batch, self.frames, *rows.shape[1:])


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """True at frames that are padding: ``[batch, frames]`` bool, given the valid ``lengths`` (``[batch]``)."""
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]


def whole_grid(batch: int, frames: int, lengths: Optional[Tensor], device: torch.device) -> Rows:
    """Every frame is a row; padding, where ``lengths`` ([batch], frames) tells of it, is merely no key."""
    offsets = torch.arange(batch + 1, device=device) * frames
    return Rows(batch, frames, None, offsets, None if lengths is None else to_device(lengths.long(), device))


def rows_of(batch: int, frames: int, lengths: Optional[Tensor], device: torch.device) -> Rows:
    """The valid frames, for which the host waits where ``lengths`` ([batch], frames) lie on a device.

    All frames where no lengths are given or no shape may follow from them.
    """
    if lengths is None or not may_decide_shapes(lengths):
        return whole_grid(batch, frames, lengths, device)
    return valid_rows(batch, frames, lengths.cpu().clamp(0, frames), device)


def valid_rows(
    batch: int, frames: int, lengths: Optional[Tensor], device: torch.device, capacity: Optional[int] = None
) -> Rows:
    """Only the valid frames are rows.

    ``lengths`` ([batch], frames, on the CPU) say how many there are; nothing waits for the device. ``capacity`` makes that
    many rows of them, the same number whatever the lengths: dead ones, which are frames of the padding, follow the valid
    ones and belong to no sequence.

    Raises:
        ValueError: if ``capacity`` is less than the valid frames or more than all frames.
    """
    if lengths is None and capacity is None:
        return whole_grid(batch, frames, None, device)
    lengths = torch.full((batch,), frames) if lengths is None else lengths.long()
    if capacity is None and bool((lengths == frames).all()):
        return whole_grid(batch, frames, None, device)
    valid = (torch.arange(frames) < lengths[:, None]).flatten()
    index = first_true(valid, capacity, "rows")
    offsets = torch.zeros(batch + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    return Rows(batch, frames, to_device(index, device), to_device(offsets, device), None, host_index=index)


def first_true(chosen: Tensor, capacity: Optional[int], name: str) -> Tensor:
    """Positions where ``chosen`` ([n] bool, on the CPU) is True; with a ``capacity``, filled up to that many with others.

    Raises:
        ValueError: if ``capacity``, which the message calls ``name``, is too small, or larger than n.
    """
    if capacity is None:
        return chosen.nonzero().squeeze(1)
    count = int(chosen.sum())
    if not count <= capacity <= len(chosen):
        raise ValueError(
            f"{name} must be at least {count}, what this batch needs, and at most {len(chosen)}; got {capacity}"
        )
    return torch.argsort(~chosen, stable=True)[:capacity]
