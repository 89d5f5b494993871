"""Operator ``bias_gelu_dropout``: what stands between the two products of a feed-forward block."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast.ops.arguments import check_channels, check_rows, dropout_seed, without_autocast
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import bias_gelu_dropout as reference
from hubert_fast.reference.dropout import kept_values


class Arguments(NamedTuple):
    x: Tensor  # [rows, channels]
    bias: Optional[Tensor]  # [channels]
    dropout_p: float
    seed: Optional[Tensor]  # [] int64


def bias_gelu_dropout(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    *,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
) -> Tensor:
    """dropout(gelu(x + bias)), with the exact (erf) GELU of Hendrycks and Gimpel 2016.

    Args:
        x: ``[rows, channels]`` float: a product to which no bias was added. Nothing else is kept for the backward.
        bias: ``[channels]`` float, of any dtype, or None.
        dropout_p: probability that a value is dropped, in [0, 1).
        seed: scalar int64 on the device of ``x``, from which the mask follows. None: drawn from torch's default generator.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    check_rows("x", x)
    check_channels(x.shape[1], bias=bias)
    seed = dropout_seed(seed, x.device, dropout_p=dropout_p)
    return _operator(Arguments(x, bias, dropout_p, seed))[0]


# Values from which rows that stay in cache take less time than whole passes do where something is dropped, where nothing is, and
# where nothing is in training: benchmarks/NOTES.md, "Whole passes on a CPU".
_MANY, _MANY_UNDROPPED, _MANY_TO_LEARN = 1 << 20, 1 << 22, 1 << 23


def _whole_passes_win(arguments: Arguments) -> bool:
    x, bias, dropout_p, _ = arguments
    if dropout_p > 0.0:
        return x.numel() < _MANY
    # Without a bias it is one pass in any case.
    return bias is None or x.numel() < (
        _MANY_TO_LEARN if torch.is_grad_enabled() and x.requires_grad else _MANY_UNDROPPED
    )


def _reference(arguments: Arguments) -> tuple[Tensor]:
    x, bias, dropout_p, seed = arguments
    kept = kept_values(seed, *x.shape, dropout_p)
    with without_autocast(x.device):
        return (reference.bias_gelu_dropout(x, bias, kept=kept),)


_operator = Operator(
    "bias_gelu_dropout",
    Arguments,
    backends={
        "triton": "one pass forward, one backward with the bias's gradient; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, gelu and dropout one after another",
    },
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.x.new_empty(arguments.x.shape),),
    gradients=["x", "bias"],
    kept=["x", "bias", "seed"],
    whole_passes_win=_whole_passes_win,
)
