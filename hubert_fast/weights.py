"""Weights of matrix products: in the dtype of the product, and their gradients in their own.

Autocast to 16 bits casts each weight in every forward, and its gradient in every backward. A graphed step spares both: it lends
a weight memory (`lend`) that holds it in 16 bits already, and memory that wants its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import cpu
from hubert_fast.switches import switches

_NAME = "_hubert_fast_lent"


class Lent(NamedTuple):
    """Memory beside a weight; a bias may have some too."""

    copy: Optional[Tensor] = None  # the weight's values in 16 bits
    gradient: Optional[Tensor] = None  # of the weight's shape and dtype; a backward overwrites it and returns it


def lend(weight: Tensor, lent: Lent) -> None:
    """Let products with ``weight`` use ``lent``, as long as this tensor lives."""
    setattr(weight, _NAME, lent)


def is_lent(weight: Tensor) -> bool:
    """Whether ``weight`` has memory lent."""
    return hasattr(weight, _NAME)


def has_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``weight`` has a copy in ``dtype`` lent."""
    copy = _lent(weight).copy
    return copy is not None and copy.dtype == dtype


def in_dtype(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights one below the other in ``dtype``: ``[sum of rows, ...]``, without a copy where memory is lent for that."""
    copies = [_lent(each).copy for each in weights]
    if all(each is not None and each.dtype == dtype for each in copies):
        whole = _whole(copies)
        return torch.cat(copies) if whole is None else whole
    if len(weights) == 1:
        return weights[0].detach().to(dtype)
    if not cpu.is_cpu(weights[0].device):
        return torch.cat([each.detach() for each in weights]).to(dtype)
    whole = weights[0].new_empty(sum(map(len, weights)), *weights[0].shape[1:], dtype=dtype)
    torch._foreach_copy_(whole.split([len(each) for each in weights]), [each.detach() for each in weights])
    return whole


def gradient_memory(weights: Sequence[Tensor]) -> Optional[Tensor]:
    """Memory that wants the gradient of the weights one below the other, or None. It is given once.

    A weight of several products has a sum of gradients, which cannot all be written to one place.
    """
    lent = [_lent(each) for each in weights]
    if any(each.gradient is None for each in lent):
        return None
    for weight, each in zip(weights, lent):
        lend(weight, each._replace(gradient=None))
    return _whole([each.gradient for each in lent])


def weight_gradient(upstream: Tensor, x: Tensor, dtype: torch.dtype, memory: Optional[Tensor]) -> Tensor:
    """The gradient of the weight of ``x weight^T``, given that of the product: ``[columns, depth]``.

    Args:
        upstream: ``[rows, columns]``.
        x: ``[rows, depth]`` in the same dtype.
        dtype: of the result.
        memory: where it goes, from `gradient_memory`; None: into new memory.
    """
    if upstream.dtype == dtype:
        return cpu.product_over_rows(upstream, x, memory)
    upstream = upstream.t()
    if dtype == torch.float32 and _has_wide_product(x) and switches.wide_weight_gradients:
        return _wide_product(upstream, x, memory)
    product = torch.mm(upstream, x)
    return product.to(dtype) if memory is None else memory.copy_(product)


def _has_wide_product(x: Tensor) -> bool:
    """Whether PyTorch gives products of 16 bits in float32, in which cuBLAS sums anyway. It does on GPUs alone."""
    return x.device.type in ("cuda", "meta") and "dtype_out" in torch.ops.aten.mm.overloads()


def _wide_product(left: Tensor, right: Tensor, memory: Optional[Tensor]) -> Tensor:
    if memory is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=memory)


def _lent(weight: Tensor) -> Lent:
    return getattr(weight, _NAME, Lent())


def _whole(parts: Sequence[Tensor]) -> Optional[Tensor]:
    """The parts as one tensor, joined along their first dimension, or None where they do not lie one after another."""
    first = parts[0]
    if len(parts) == 1:
        return first
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != place or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return None
        place += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
