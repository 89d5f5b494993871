"""Operator ``mask_fill``: the mask embedding and the padding's zeros, with the bias and dropout of the projection before."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.ops.arguments import check_channels, check_rows, dropout_seed
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import mask_fill as reference
from hubert_fast.reference.dropout import kept_values


class Arguments(NamedTuple):
    x: Tensor  # [rows, channels]
    bias: Optional[Tensor]  # [channels]
    embedding: Tensor  # [channels]
    mask: Tensor  # [rows] bool
    padding: Optional[Tensor]  # [rows] bool
    dropout_p: float
    seed: Optional[Tensor]  # [] int64


def mask_fill(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    embedding: Tensor,  # [channels]
    mask: Tensor,  # [rows] bool
    *,
    padding: Optional[Tensor] = None,  # [rows] bool
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
) -> Tensor:
    """``embedding`` in masked rows, 0 in those of padding, dropout(x + bias) in the others (wav2vec 2.0, section 3.1).

    Args:
        x: ``[rows, channels]`` float: a product to which no bias was added. It is not kept for the backward.
        bias, embedding: ``[channels]`` float, of any dtype; ``bias`` may be None.
        mask: ``[rows]`` bool: True is masked, whether padding or not.
        padding: ``[rows]`` bool: True is padding. None: there is none.
        dropout_p: probability that a value of ``x + bias`` is dropped, in [0, 1).
        seed: scalar int64 on the device of ``x``, from which dropout follows. None: drawn from torch's default generator.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    check_rows("x", x)
    check_channels(x.shape[1], bias=bias, embedding=embedding)
    for name, flags in (("mask", mask), ("padding", padding)):
        if flags is not None and (flags.dtype != torch.bool or flags.shape != x.shape[:1]):
            raise ValueError(f"{name} must be bool of shape [{len(x)}]; got {flags.dtype} {tuple(flags.shape)}")
    seed = dropout_seed(seed, x.device, dropout_p=dropout_p)
    return _operator(Arguments(x, bias, embedding, mask, padding, dropout_p, seed))[0]


def _reference(arguments: Arguments) -> tuple[Tensor]:
    *tensors, dropout_p, seed = arguments
    kept = kept_values(seed, *arguments.x.shape, dropout_p)
    return (reference.mask_fill(*tensors, kept=kept),)


_operator = Operator(
    "mask_fill",
    Arguments,
    backends={
        "triton": "one pass forward, one backward with the gradients of bias and embedding; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, dropout, padding and embedding one after another",
    },
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.x.new_empty(arguments.x.shape),),
    gradients=["x", "bias", "embedding"],
    kept=["bias", "embedding", "mask", "padding", "seed"],
    whole_passes_win=lambda arguments: True,  # benchmarks/NOTES.md, "Whole passes on a CPU"
)
