"""CUDA graphs of one process's work, which share one pool of memory."""

from __future__ import annotations

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
        self._device = device
        self._stream = torch.cuda.Stream(device)
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
            with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self._device):
                with torch.autograd.set_multithreading_enabled(False):
                    yield
        finally:  # where memory ran out too: what follows may free what this still reads
            here.wait_stream(self._stream)

    def _make_room(self) -> None:
        """Give back what other pools hold unused, where little else is free: in a pool torch does not do that by itself."""
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if unused > torch.cuda.mem_get_info(self._device)[0]:
            torch.cuda.empty_cache()

    def __call__(self, work: Work) -> Work:
        """A function that does on the GPU what ``work`` does now, on the same memory."""
        self._make_room()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), torch.autograd.set_multithreading_enabled(False):
            # Not `torch.cuda.graph`, which waits for the device and gives back unused memory before each of many captures. A
            # thread that pins memory for a data loader meanwhile would break a capture of mode "global".
            graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay
