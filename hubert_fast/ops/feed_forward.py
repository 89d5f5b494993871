"""Operator ``feed_forward``: both products of a transformer's feed-forward block, and what stands between them."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import backend, extension
from hubert_fast.cuda_backend import feed_forward as cuda_backend
from hubert_fast.ops.arguments import autocast_dtype, check_channels, check_rows, dropout_seed
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from hubert_fast.ops.linear import linear
from hubert_fast.ops.operator import Operator, is_plain_call
from hubert_fast.reference import feed_forward as reference
from hubert_fast.reference.dropout import kept_values
from hubert_fast.switches import switches
from hubert_fast.weights import is_lent


class Arguments(NamedTuple):
    x: Tensor  # [rows, dim]
    weight1: Tensor  # [hidden, dim]
    bias1: Tensor  # [hidden]
    weight2: Tensor  # [dim, hidden]
    dropout_p: float
    seed: Optional[Tensor]  # [] int64
    dtype: torch.dtype  # of the products


def feed_forward(
    x: Tensor,  # [rows, dim]
    weight1: Tensor,  # [hidden, dim]
    bias1: Tensor,  # [hidden]
    weight2: Tensor,  # [dim, hidden]
    *,
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
) -> Tensor:  # [rows, dim]
    """``dropout(gelu(x weight1^T + bias1)) weight2^T`` (Vaswani et al. 2017, section 3.3) less the second bias, which the pass
    that follows adds.

    On backend "torch", and wherever somebody looks into a call that chose no backend by name (compilers, dispatch modes), it is
    `linear`, `bias_gelu_dropout` and `linear`.

    Args:
        x: ``[rows, dim]`` float.
        weight1, bias1, weight2: ``[hidden, dim]``, ``[hidden]``, ``[dim, hidden]`` float. Without autocast a weight has the
            dtype of ``x``, or has memory lent (`weights.lend`).
        dropout_p: probability that a hidden value is dropped, in [0, 1).
        seed: scalar int64 on the device of ``x``, from which the mask follows. None: drawn from torch's default generator.

    Returns:
        ``[rows, dim]``, in autocast's dtype where it is on, else in that of ``x``. On backend "cuda" there is no second
        derivative.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    dtype = _check(x, weight1, bias1, weight2)
    seed = dropout_seed(seed, x.device, dropout_p=dropout_p)
    arguments = Arguments(x, weight1, bias1, weight2, dropout_p, seed, dtype)
    composed = not (switches.gelu_epilogues and is_plain_call(arguments)) and backend.is_automatic(_operator.name)
    chosen = "torch" if composed else _operator.choose(arguments)
    if chosen != "torch":
        return _operator.run(chosen, arguments)[0]
    return linear(bias_gelu_dropout(linear(x, [weight1]), bias1, dropout_p=dropout_p, seed=seed), [weight2])


def keeps_hidden_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block in ``dtype`` that drops nothing keeps its hidden values before GELU alone, and not those after it too."""
    x, bias = (torch.empty(size, device=device, dtype=dtype) for size in ((8, 8), (8,)))
    return switches.gelu_epilogues and _operator.choose(Arguments(x, x, bias, x, 0.0, None, dtype)) == "cuda"


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> torch.dtype:
    """The products' dtype, once the arguments are known to be good."""
    check_rows("x", x)
    hidden, dim = bias1.numel(), x.shape[1]
    autocast = autocast_dtype(x.device)
    # Autocast leaves float64 alone.
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
    for name, weight, shape in (("weight1", weight1, (hidden, dim)), ("weight2", weight2, (dim, hidden))):
        if weight.shape != shape or not weight.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape {list(shape)}; got {weight.dtype} {tuple(weight.shape)}"
            )
        if autocast is None and weight.dtype != x.dtype and not is_lent(weight):
            raise ValueError(f"{name} must have the dtype of x without autocast, {x.dtype}; got {weight.dtype}")
    check_channels(hidden, bias1=bias1)
    return dtype


def _objection(name: str, arguments: Arguments) -> backend.Objection:
    return cuda_backend.objection(arguments) if name == "cuda" else None


def _reference(arguments: Arguments) -> tuple[Tensor]:
    x, weight1, bias1, weight2, dropout_p, seed, _ = arguments
    kept = kept_values(seed, x.shape[0], weight1.shape[0], dropout_p)
    return (reference.feed_forward(x, weight1, bias1, weight2, kept=kept),)


def _flops(arguments: Arguments, backward: bool) -> int:
    """Two products forward, four backward."""
    return (4 if backward else 2) * 2 * len(arguments.x) * arguments.weight1.numel()


_operator = Operator(
    "feed_forward",
    Arguments,
    backends={
        "cuda": "CUDA kernels: GELU and its derivative in the products' epilogues; values before GELU are all that is kept",
        "torch": "two products, and bias_gelu_dropout between them",
        "reference": "linear, gelu, dropout and linear one after another",
    },
    unavailable={"cuda": lambda: extension.why_not("cuda")},
    reference=_reference,
    results=["out"],
    fake=lambda arguments, save: (arguments.x.new_empty(arguments.x.shape, dtype=arguments.dtype),),
    gradients=["x", "weight1", "bias1", "weight2"],
    kept=["x", "weight1", "bias1", "weight2"],
    objection=_objection,
    flops=_flops,
)
