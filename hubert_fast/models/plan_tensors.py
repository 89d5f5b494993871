"""The tensors of a step's plan in one piece of memory, which is copied to the device at once."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.models.capacities import Capacity
from hubert_fast.models.plan import StepPlan
from hubert_fast.models.rows import Rows, first_true

_ALIGNMENT = 16  # bytes: each tensor begins at a multiple, so that kernels load 16 bytes at a time


class PlanTensors(NamedTuple):
    """A step's plan, filled up to the sizes of a capacity."""

    gather: Tensor  # [rows] int64: position of each valid row in the flattened [batch, frames] of the batch, then 0
    index: Tensor  # [rows] int64: position of each row in the flattened [sequences, max_frames] of the capacity
    offsets: Tensor  # [sequences + 1] int64: the batch's sequences, then empty ones
    keep: Optional[Tensor]  # [kept] int64: the masked rows, then fillers; None: all, and kept below is rows
    kept_offsets: Optional[Tensor]  # [sequences + 1] int64: as of `Rows`
    labels: Tensor  # [kept] int64, -1 where there is none
    mask: Tensor  # [rows] bool: valid and masked
    masked: Tensor  # [kept] bool: valid and masked
    unmasked: Tensor  # [kept] bool: valid and not masked
    channel_mask: Optional[Tensor]  # [sequences, dim] bool

    @classmethod
    def in_memory(cls, memory: Tensor, capacity: Capacity, channels: int) -> PlanTensors:
        """Views of ``memory``, uint8 of `nbytes`; ``channels`` are those of the mask of channels, 0 without one."""
        views: list[Optional[Tensor]] = []
        start = 0
        for dtype, shape in _layout(capacity, channels):
            if shape is None:
                views.append(None)
                continue
            size = dtype.itemsize * math.prod(shape)
            views.append(memory[start : start + size].view(dtype).view(shape))
            start += _aligned(size)
        return cls(*views)

    def step_plan(self, capacity: Capacity) -> StepPlan:
        """The same as an encoder takes it, on the grid of the capacity."""
        layout = Rows(capacity.sequences, capacity.max_frames, self.index, self.offsets, None)
        kept = self.keep, self.kept_offsets, self.labels, self.masked, self.unmasked
        return StepPlan(layout, self.mask, self.channel_mask, *kept, None)


def nbytes(capacity: Capacity, channels: int) -> int:
    """Bytes of the tensors of a plan."""
    shapes = (shape for shape in _layout(capacity, channels) if shape[1] is not None)
    return sum(_aligned(dtype.itemsize * math.prod(shape)) for dtype, shape in shapes)


def packed(plan: StepPlan, capacity: Capacity) -> Tensor:
    """``plan``, whose tensors lie on the CPU, as uint8 memory for `PlanTensors.in_memory`.

    Dead rows lie where the grid of the capacity has no frame. Rows that fill up ``keep`` are not masked and have no label.
    """
    layout, channel_mask = plan.layout, plan.channel_mask
    channels = 0 if channel_mask is None else channel_mask.shape[1]
    memory = torch.zeros(nbytes(capacity, channels), dtype=torch.uint8)
    tensors = PlanTensors.in_memory(memory, capacity, channels)
    valid = int(layout.offsets[-1])
    places = torch.arange(valid) if layout.index is None else layout.index[:valid]
    tensors.gather[:valid] = places
    tensors.index.copy_(grid_places(places, layout.frames, capacity))
    tensors.offsets.copy_(with_empty_sequences(layout.offsets, capacity))
    tensors.mask[:valid] = plan.mask[:valid]
    if channel_mask is not None:
        tensors.channel_mask[: layout.batch] = channel_mask
    tensors.labels.fill_(-1)
    if tensors.keep is None:
        count = valid
    else:
        tensors.keep.copy_(first_true(tensors.mask, capacity.kept, "kept"))
        tensors.kept_offsets.copy_(with_empty_sequences(plan.kept_offsets, capacity))
        count = len(plan.keep)
    for name in ("labels", "masked", "unmasked"):
        getattr(tensors, name)[:count] = getattr(plan, name)[:count]
    return memory


def grid_places(places: Tensor, frames: int, capacity: Capacity) -> Tensor:
    """Positions in the flattened grid ``[sequences, max_frames]`` of a capacity: ``[rows]`` int64.

    Those of valid rows, given their ``places`` ([valid] int64) in a grid of ``frames`` a sequence, then, for dead rows, others.
    """
    sequence = torch.div(places, frames, rounding_mode="floor")
    index = sequence * capacity.max_frames + places - sequence * frames
    free = torch.ones(capacity.sequences * capacity.max_frames, dtype=torch.bool)
    free[index] = False
    return torch.cat([index, free.nonzero().squeeze(1)[: capacity.rows - len(places)]])


def with_empty_sequences(offsets: Tensor, capacity: Capacity) -> Tensor:
    """``offsets`` ([batch + 1] int64) of a batch, with those of empty sequences up to the number of a capacity."""
    return torch.cat([offsets, offsets[-1:].expand(capacity.sequences + 1 - len(offsets))])


def _layout(capacity: Capacity, channels: int) -> list[tuple[torch.dtype, Optional[tuple[int, ...]]]]:
    """Dtype and shape of each of `PlanTensors`; None where there is no such tensor."""
    rows, kept, sequences, _ = capacity
    output = rows if kept is None else kept
    of_kept = (None, None) if kept is None else ((kept,), (sequences + 1,))
    numbers = [(rows,), (rows,), (sequences + 1,), *of_kept, (output,)]
    flags = [(rows,), (output,), (output,), (sequences, channels) if channels else None]
    return [*((torch.int64, shape) for shape in numbers), *((torch.bool, shape) for shape in flags)]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
