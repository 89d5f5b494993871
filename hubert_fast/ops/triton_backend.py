"""Whether operators may run on Triton kernels: in this installation, and on the tensors at hand."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from typing import Optional

import torch
from torch import Tensor

from hubert_fast import backend

# What Triton's kernels load and store; float64 runs on the other backends.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def why_not() -> Optional[str]:
    """Why no kernel can run in this installation, or None. Triton itself, which takes long to import, is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # a build that goes by another name, as pytorch-triton
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (3, 6):
        return f"it needs Triton 3.6 or newer; this is {version}"
    return None


def objection(operator: str, *tensors: Optional[Tensor]) -> backend.Objection:
    """Why the kernels of ``operator`` cannot take ``tensors``, the first of which says where the others must be."""
    device = tensors[0].device.type
    if device not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on an NVIDIA GPU, and the inputs are on {device!r}"
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16; got {tensor.dtype}"
    try:
        from hubert_fast.kernels import launch
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.why_not(tensors[0], automatic=backend.is_automatic(operator))
