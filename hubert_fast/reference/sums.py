"""Sums of the row passes, in as little memory as PyTorch's functions allow."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def biased(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    """``x + bias``; ``x`` without one.

    A bias that is wider than ``x`` widens the sum, and so what comes of it and every gradient, but for inference, where
    it is rounded first, as autocast has it in a Linear: passes over 16 bits take half the time.
    """
    if bias is None:
        return x
    return x + (bias if torch.is_grad_enabled() else bias.to(x.dtype))


def plus_(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh + other`` in the memory of ``fresh``, which nobody else has; it is touched once then, and in cache."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return fresh + other  # `vmap` may have several of ``other`` for one ``fresh``
    return fresh.add_(other)
