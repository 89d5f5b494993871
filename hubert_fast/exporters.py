"""Whether an exporter looks at a call, to make a program of it that runs without this package."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether `torch.export`, one of the exporters to ONNX or `torch.jit.trace` looks; `torch.compile` is none of them.

    Operators are plain ATen formulas then, and no shape follows from the numbers of a tensor.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None
