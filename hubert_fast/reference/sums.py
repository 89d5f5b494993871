"""Casts, sums and GELU that the formulas of row passes share, in place where nobody else has the memory."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without the call where ``x`` has that dtype.

    A pass would have five such calls, of 1 to 2 us each.
    """
    return x if x.dtype == dtype else x.to(dtype)


def biased(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``x + bias``; ``x`` without one.

    A bias that is wider than ``x`` widens the sum, what comes of it and every gradient. In inference it is rounded first, as
    autocast has it in a Linear: passes over 16 bits take half the time.
    """
    if bias is None:
        return x
    return x + (bias if torch.is_grad_enabled() else bias.to(x.dtype))


def plus_(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh + other`` in the memory of ``fresh``, which nobody else has; it is touched once then, and in cache."""
    return fresh.add_(other) if _is_eager() else fresh + other


def gelu_(fresh: Tensor) -> Tensor:
    """The exact GELU of ``fresh``, in its memory where no gradient is wanted."""
    return torch.ops.aten.gelu_(fresh) if _is_eager() and not torch.is_grad_enabled() else F.gelu(fresh)


def _is_eager() -> bool:
    """Whether a tensor is what it seems to be: `vmap` may have several of one for one of another."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
