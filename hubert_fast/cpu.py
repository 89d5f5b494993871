"""How products are best computed on a CPU.

oneDNN has products in 16 bits for processors that have vector instructions for them. On others PyTorch's own loops take over: on
an AMD EPYC of 2021 (AVX2), 2 threads, a product of 2048 x 768 x 768 ran at 1.3 GFLOP/s in bfloat16 and at 123 in float32. There
operands are widened, multiplied in float32 and rounded once.
"""

from __future__ import annotations

import os

import torch


def _has_products(name: str) -> bool:
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return asked is not None and torch.backends.mkldnn.is_available() and bool(asked())


# Asked once, here: torch.compile cannot trace the question.
_SLOW = {dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _has_products(name)}


def is_cpu(device: torch.device) -> bool:
    """Whether work on ``device`` is arranged for a CPU: not where Triton's interpreter stands in for a GPU.

    What counts a GPU's launches on a CPU replaces this.
    """
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply ``dtype`` on ``device`` in: float32 where a CPU has no fast product in 16 bits."""
    return torch.float32 if dtype in _SLOW and is_cpu(device) else dtype
