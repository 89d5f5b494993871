"""Small tensors that are made on the host and used on a GPU, or come from there to decide about shapes."""

from __future__ import annotations

import torch
from torch import Tensor

_TRACERS = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; the host does not wait for the copy."""
    if device.type == "cuda" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def may_decide_shapes(x: Tensor) -> bool:
    """Whether shapes may follow from the numbers of ``x``.

    Not where it has none (fake, meta), nor where the call is compiled, exported, traced or captured in a CUDA graph, to be
    repeated on others.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:
        return False
    traced = (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)
    )
    return not traced and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def on_host(x: Tensor) -> Tensor:
    """``x`` on the CPU, for which the host waits where it lies on a device; as it is where it may not decide about shapes."""
    return x.cpu() if may_decide_shapes(x) else x
