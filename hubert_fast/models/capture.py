"""CUDA graphs of one process's work, which share one pool of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[], None]


class CudaCapture:
    """Captures work on ``device`` as CUDA graphs.

    Their temporary tensors lie in one pool: what one graph leaves there the next may overwrite, so results that are to last
    are copied to tensors from elsewhere. Autograd runs its backward in the calling thread, so that all that is captured is
    captured from one thread.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)
        self._stream = torch.cuda.Stream(self._device)
        self._reserved = 0  # bytes, after memory was last given back
        self.renew()

    def renew(self) -> None:
        """Begin another pool, for which graphs made before must have been dropped."""
        with torch.cuda.device(self._device):  # a pool lives on the current one
            self._pool = torch.cuda.MemPool()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Inside it work is done in the pool, not captured: the first time it compiles kernels and makes handles."""
        self._make_room()
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with self._alone(), torch.cuda.use_mem_pool(self._pool, self._device):
                yield
        finally:  # where memory ran out too: what follows may free what this still reads
            here.wait_stream(self._stream)

    def _make_room(self) -> None:
        """Give back what other pools hold unused, where little else is free: for a pool torch does not do that by itself."""
        reserved = torch.cuda.memory_reserved(self._device)
        unused = reserved - torch.cuda.memory_allocated(self._device)
        if reserved > self._reserved and unused > torch.cuda.mem_get_info(self._device)[0]:
            torch.cuda.empty_cache()
            self._reserved = torch.cuda.memory_reserved(self._device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside it work goes to the stream of captures, from this thread alone, and no dead pool is given back: that aborts."""
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            if collects:
                gc.enable()

    def __call__(self, work: Work) -> Work:
        """A function that does on the GPU what ``work`` does now, on the same memory."""
        graph = torch.cuda.CUDAGraph()
        with self._alone():
            # Not `torch.cuda.graph`, which waits for the device and gives back unused memory before each of many captures. A
            # thread that pins memory for a data loader meanwhile would break a capture of mode "global".
            graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay
