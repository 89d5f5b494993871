"""Whether operators may run on Triton kernels: in this installation, and on the tensors at hand."""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor

from hubert_fast import backend

# What Triton's kernels load and store; float64 runs on the other backends.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def why_not() -> Optional[str]:
    """Why no kernel can run in this installation, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton)"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"it needs Triton 3.6 or newer; this is {triton.__version__}"
    try:
        import hubert_fast.kernels.launch  # noqa: F401
    except ImportError as error:
        return f"its kernels cannot be imported: {error}"
    return None


def objection(operator: str, *tensors: Optional[Tensor]) -> backend.Objection:
    """Why the kernels of ``operator`` cannot take ``tensors``, the first of which says where the others must be."""
    from hubert_fast.kernels import launch

    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16; got {tensor.dtype}"
    return launch.why_not(tensors[0], automatic=backend.is_automatic(operator))
