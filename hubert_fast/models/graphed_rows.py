"""A function of packed rows without gradients, in CUDA graphs: for features of a whole corpus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Optional, Protocol

import torch
from torch import Tensor

from hubert_fast.models.capacities import Capacities, Capacity
from hubert_fast.models.capture import Work
from hubert_fast.models.plan_tensors import grid_places, with_empty_sequences
from hubert_fast.models.rows import Rows
from hubert_fast.ops.host_tensors import to_device

_MOST_GRAPHS = 64  # capacities


class Capture(Protocol):
    """The interface of `hubert_fast.models.capture.CudaCapture`."""

    def ahead(self) -> contextlib.AbstractContextManager[None]: ...

    def __call__(self, work: Work) -> Work: ...


class GraphedRows:
    """Runs ``function`` on the valid frames of a batch, rounded up to a capacity: a capacity runs as it is the first time and is
    captured the second.

    Args:
        function: (rows ``[rows, channels]``, layout) -> ``[results, rows, ...]``. It waits for nothing, and what it reads
            besides stays where it is.
        capacities: sizes that batches are rounded up to; a batch that fits none runs as it is.
        capture: makes a graph of work. None: nothing is captured, and batches keep their sizes.
    """

    def __init__(
        self, function: Callable[[Tensor, Rows], Tensor], capacities: Capacities, capture: Optional[Capture]
    ) -> None:
        self._function, self._capacities, self._capture = function, capacities, capture
        self._programs: dict[tuple[Capacity, torch.dtype], _Program] = {}
        self._memory: dict[torch.dtype, Tensor] = {}  # of rows
        self._results: Optional[Tensor] = None

    def __call__(
        self,
        features: Tensor,  # [batch, frames, channels]
        lengths: Tensor,  # [batch] int64 on the CPU, frames
    ) -> Tensor:
        """The function's results on the valid frames, ``[results, valid, ...]``, good until the next call.

        Nothing waits for the device.
        """
        batch, frames, channels = features.shape
        valid, longest = int(lengths.sum()), max(1, int(lengths.max()))
        room = None
        if self._capture is not None:
            room = self._capacities.room_for(Capacity(valid, None, batch, longest))
        capacity = room or Capacity(valid, None, batch, longest)
        inside = torch.arange(frames) < lengths[:, None]
        gather, offsets = inside.flatten().nonzero().squeeze(1), torch.zeros(batch + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        places = torch.cat([gather, grid_places(gather, frames, capacity), with_empty_sequences(offsets, capacity)])
        places = to_device(places, features.device)
        gather, places = places[:valid], places[valid:]
        if room is None:
            rows = features.flatten(0, 1).index_select(0, gather)
            return self._function(rows, _layout(places, capacity))
        program = self._program(room, features)
        program.places.copy_(places)
        torch.index_select(features.flatten(0, 1), 0, gather, out=program.rows[:valid])
        program.rows[valid:].zero_()
        return self._run(program)[:, :valid]

    def _program(self, capacity: Capacity, features: Tensor) -> _Program:
        key = capacity, features.dtype
        if key not in self._programs:
            if features.dtype not in self._memory:
                self._memory[features.dtype] = features.new_empty(self._capacities.largest_rows, features.shape[2])
            self._programs[key] = _Program(capacity, self._memory[features.dtype][: capacity.rows])
        return self._programs[key]

    def _run(self, program: _Program) -> Tensor:
        if program.graph is None:
            captured = sum(each.graph is not None for each in self._programs.values())
            if program.result is None or captured >= _MOST_GRAPHS:
                with self._capture.ahead():
                    found = self._function(program.rows, program.layout)
                # Not in the pool, where the next graph would overwrite it.
                program.result = self._memory_of_results(found, program.capacity)
                return program.result.copy_(found)
            result = program.result
            program.graph = self._capture(lambda: result.copy_(self._function(program.rows, program.layout)))
        program.graph()
        return program.result

    def _memory_of_results(self, found: Tensor, capacity: Capacity) -> Tensor:
        """Memory of the shape of ``found``, the same for all capacities: it is read before the next call."""
        if self._results is None:
            numel = found.numel() // capacity.rows * self._capacities.largest_rows
            self._results = torch.empty(numel, dtype=found.dtype, device=found.device)
        return self._results[: found.numel()].view(found.shape)


class _Program:
    """Memory and graph of one capacity."""

    def __init__(self, capacity: Capacity, rows: Tensor) -> None:
        self.capacity, self.rows = capacity, rows
        self.places = torch.zeros(capacity.rows + capacity.sequences + 1, dtype=torch.int64, device=rows.device)
        self.layout = _layout(self.places, capacity)
        self.result: Optional[Tensor] = None
        self.graph: Optional[Work] = None


def _layout(places: Tensor, capacity: Capacity) -> Rows:
    index, offsets = places[: capacity.rows], places[capacity.rows :]
    return Rows(capacity.sequences, capacity.max_frames, index, offsets, None)
