"""Rows: the frames of a batch as one ``[rows, channels]`` matrix, with or without the padding.

Padded frames never influence valid ones (they are 0 before the positional convolution and are no keys after it), so all that
follows the positional convolution may leave them out.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the rows lie in the ``[batch, frames]`` grid."""

    batch: int
    frames: int
    index: Optional[Tensor]  # [rows] int64: position of each row in the flattened grid; None: the whole grid
    offsets: Tensor  # [batch + 1] int64: rows offsets[i] : offsets[i + 1] are those of sequence i
    key_lengths: Optional[Tensor]  # [batch] int64: valid rows at the head of each sequence; None: all
    host_index: Optional[Tensor] = None  # index, on the CPU

    def pack(self, grid: Tensor) -> Tensor:
        """``[batch, frames, ...]`` to ``[rows, ...]``."""
        flat = grid.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """``[rows, ...]`` to ``[batch, frames, ...]``, with 0 where there is no row."""
        if self.index is not None:
            grid = rows.new_zeros(self.batch * self.frames, *rows.shape[1:])
            rows = grid.index_copy(0, self.index, rows)
        return rows.unflatten(0, (self.batch, self.frames))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; the host does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def whole_grid(batch: int, frames: int, lengths: Optional[Tensor], device: torch.device) -> Rows:
    """Every frame is a row; padding, where ``lengths`` ([batch], frames) tells of it, is merely no key."""
    offsets = torch.arange(batch + 1, device=device) * frames
    return Rows(batch, frames, None, offsets, None if lengths is None else lengths.long())


def valid_rows(batch: int, frames: int, lengths: Optional[Tensor], device: torch.device) -> Rows:
    """Only the valid frames are rows.

    With ``lengths`` on the host their number is known without a synchronisation. In a compiled graph, where it may not
    depend on data, the whole grid is taken.
    """
    if lengths is None or torch.compiler.is_compiling():
        return whole_grid(batch, frames, lengths, device)
    lengths = lengths.long().cpu()
    if bool((lengths == frames).all()):
        return whole_grid(batch, frames, None, torch.device("cpu"))
    valid = torch.arange(frames) < lengths[:, None]
    index = valid.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(batch + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    return Rows(batch, frames, to_device(index, device), offsets, None, host_index=index)
