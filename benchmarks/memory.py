"""Peak memory of a call: PyTorch's allocations on a GPU; on a CPU resident memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubert_fast.pretrain.proc import proc_bytes


def peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that ``call`` takes at its peak beyond what is held before it. None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        return allocated_peak_of(call, device)
    if not Path("/proc/self/clear_refs").exists():
        call()
        return None
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = proc_bytes("self/status", "VmRSS")
    call()
    return max(0, proc_bytes("self/status", "VmHWM") - before)


def allocated_peak_of(call: Callable[[], Any], device: torch.device | str) -> int:
    """Peak memory as PyTorch's allocator on a GPU counts it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held_by(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of weights, buffers and the optimizer's state."""
    tensors = [*module.parameters(), *module.buffers()]
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors += [each for each in state.values() if isinstance(each, torch.Tensor)]
    return sum(each.untyped_storage().nbytes() for each in {each.data_ptr(): each for each in tensors}.values())


def _give_back_freed_memory() -> None:
    """What the C library keeps of freed memory would hide as much of the call's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
