"""Operator ``bias_dropout_residual``: what follows the last product of a block whose LayerNorm comes elsewhere."""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from hubert_fast.ops.arguments import check_channels, check_residual, check_rows, dropout_seed
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import bias_dropout_residual as reference
from hubert_fast.reference.dropout import kept_values


class Arguments(NamedTuple):
    x: Tensor  # [rows, channels]
    bias: Optional[Tensor]  # [channels]
    residual: Optional[Tensor]  # [positions, channels]
    index: Optional[Tensor]  # [rows] int64
    dropout_p: float
    seed: Optional[Tensor]  # [] int64


def bias_dropout_residual(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    residual: Optional[Tensor] = None,  # [positions, channels]
    *,
    index: Optional[Tensor] = None,  # [rows] int64
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
) -> Tensor:
    """residual[index] + dropout(x + bias), or dropout(x + bias) alone.

    Args:
        x: ``[rows, channels]`` float: a product to which no bias was added. It is not kept for the backward.
        bias: ``[channels]`` float, of any dtype, or None.
        residual: ``[positions, channels]`` float, of any dtype; as many positions as rows without an index. None: there is
            none, and no index.
        index: ``[rows]`` int64: the position of each row, each at most once. None: row i is position i.
        dropout_p: probability that a value of ``x + bias`` is dropped, in [0, 1).
        seed: scalar int64 on the device of ``x``, from which the mask follows. None: drawn from torch's default generator.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``; ``x`` itself where nothing is added and nothing dropped.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    check_rows("x", x)
    check_channels(x.shape[1], bias=bias)
    if residual is not None:
        check_residual(residual, *x.shape, index)
    elif index is not None:
        raise ValueError("index was given without a residual")
    seed = dropout_seed(seed, x.device, dropout_p=dropout_p)
    if bias is None and residual is None and dropout_p == 0.0:
        return x
    return _operator(Arguments(x, bias, residual, index, dropout_p, seed))[0]


def _reference(arguments: Arguments) -> tuple[Tensor]:
    x, bias, residual, index, dropout_p, seed = arguments
    kept = kept_values(seed, *x.shape, dropout_p)
    return (reference.bias_dropout_residual(x, bias, residual, index, kept=kept),)


_operator = Operator(
    "bias_dropout_residual",
    Arguments,
    backends={
        "triton": "one pass forward, one backward with the bias's gradient; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, dropout and sum one after another",
    },
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.x.new_empty(arguments.x.shape),),
    gradients=["x", "bias", "residual"],
    kept=["bias", "index", "seed"],
    whole_passes_win=lambda arguments: True,  # benchmarks/NOTES.md, "Whole passes on a CPU"
)
