"""The extension's products and their epilogues by PyTorch, in any dtype: in place of ``hubert_fast._C.cuda``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

Product = SimpleNamespace


def set_device(index: int) -> None:
    """Take no notice of the device: there is one."""


def tensor_core_products_available(dtype: int) -> bool:
    return True


def product_gelu(
    operands: Any, *, bias: Optional[Tensor], z: Optional[Tensor], activation: Tensor, dtype: int, stream: int
) -> None:
    exact = _product(operands, operands.weight.view(operands.columns, operands.depth).t())
    exact = exact if bias is None else exact + bias
    if z is not None:
        z.copy_(exact)
    activation.copy_(F.gelu(exact))


def product_gelu_gradient(
    operands: Any, *, z: Tensor, out: Tensor, activation: Optional[Tensor], out_stride: int, dtype: int, stream: int
) -> None:
    assert out_stride == operands.columns
    exact = _product(operands, operands.weight.view(operands.depth, operands.columns))
    wide = z.to(exact.dtype)
    out.copy_(torch.ops.aten.gelu_backward(exact, wide))
    if activation is not None:
        activation.copy_(F.gelu(wide))


def _product(operands: Any, weight: Tensor) -> Tensor:
    """In float32, or float64 where that is given, with the checks of ``csrc/cuda/gemm.cpp`` on memory."""
    rows = operands.input
    assert rows.shape == (operands.rows, operands.depth) and rows.is_contiguous() and rows.data_ptr() % 16 == 0
    assert operands.input_stride == operands.depth and operands.weight.data_ptr() % 16 == 0
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide) @ weight.to(wide)
