"""Self-attention on a CPU with dropout in C++, so that no mask is in memory; the rest is `hubert_fast.torch_backend`'s.

Drawing the masks from PyTorch's generator, forward and backward, took 12% of a training step in bfloat16 (4 x 10 s, base, two
threads of an AMD EPYC of 2024): 0.5 of 3.6 s. The C++ pass took 0.02 s of it, when weights were still bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from hubert_fast import cpu, extension
from hubert_fast.reference.dropout import keep_scale, keep_threshold
from hubert_fast.torch_backend import masked_attention as torch_backend
from hubert_fast.torch_backend.masked_attention import Drop, saved_tensors

if TYPE_CHECKING:
    from hubert_fast.ops.masked_attention import Arguments

__all__ = ["backward", "forward", "objection", "saved_tensors"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 1 << 32  # more than a batch has: a mask does not depend on how many rows there are


def objection(arguments: Arguments) -> Optional[str]:
    """Why this backend, which is there, cannot take these inputs, or None where it can."""
    qkv = arguments.qkv
    if not cpu.is_cpu(qkv.device):
        return f"it runs on a CPU, and qkv is on {qkv.device}"
    if qkv.dtype not in _DTYPES:
        return f"it computes in float32 for rows of {', '.join(map(str, _DTYPES))}; qkv is {qkv.dtype}"
    return None


class _Masks(torch_backend.Masks):
    """Each weight is kept or not by a hash of the seed, its head, its row in the batch and its key."""

    def __init__(self, arguments: Arguments) -> None:
        p = arguments.dropout_p
        kernels = extension.cpu()
        assert kernels is not None, extension.why_not("cpu")
        self._drop = kernels.drop
        self._settings = {
            "seed": int(arguments.seed),
            "threshold": keep_threshold(p),
            "scale": keep_scale(p),
            "threads": torch.get_num_threads(),
        }

    def of(self, sequence: torch_backend._Sequence, group: slice) -> Drop:
        queried, first = sequence.queried, group.start * _ROWS
        index = queried.contiguous() if isinstance(queried, Tensor) else None

        def drop(x: Tensor, out: Tensor) -> Tensor:
            assert x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
            groups, rows, columns = x.shape
            self._drop(
                values=x,
                out=out,
                groups=groups,
                rows=rows,
                columns=columns,
                index=index,
                first=first + (queried.start if index is None else 0),
                stride=_ROWS,
                **self._settings,
            )
            return out

        return drop


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    return torch_backend.forward(arguments, save, _Masks)


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Optional[Tensor], ...]:
    return torch_backend.backward(arguments, saved, gradients, wanted, _Masks)
