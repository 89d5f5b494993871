"""Operator ``bias_gelu_dropout``: what stands between the two products of a feed-forward block."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.ops.dropout import dropout_seed
from hubert_fast.ops.row_arguments import check_channels, check_rows
from hubert_fast.reference import bias_gelu_dropout as reference
from hubert_fast.reference.dropout import keep_scale
from hubert_fast.torch_backend import bias_gelu_dropout as torch_backend
from hubert_fast.torch_backend.dropout_mask import kept_values

backend.register(
    "bias_gelu_dropout",
    {
        "triton": "one pass forward, one backward with the bias's gradient; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, gelu and dropout one after another",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
)


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
    chosen = backend.choose("bias_gelu_dropout", lambda name: _objection(name, x, bias))
    if chosen == "reference":
        kept = kept_values(seed, *x.shape, dropout_p)
        with without_autocast(x.device):
            return reference.bias_gelu_dropout(x, bias, kept=kept, scale=keep_scale(dropout_p))
    return _bias_gelu_dropout(x, bias, dropout_p, seed, chosen)


def _objection(name: str, *tensors: Optional[Tensor]) -> backend.Objection:
    return triton_backend.objection("bias_gelu_dropout", *tensors) if name == "triton" else None


@torch.library.custom_op("hubert_fast::bias_gelu_dropout", mutates_args=())
def _bias_gelu_dropout(
    x: Tensor, bias: Optional[Tensor], dropout_p: float, seed: Optional[Tensor], chosen: str
) -> Tensor:
    with without_autocast(x.device):
        return _implementation(chosen).bias_gelu_dropout(x, bias, dropout_p, seed)


@_bias_gelu_dropout.register_fake
def _(x, bias, dropout_p, seed, chosen):
    return x.new_empty(x.shape)


@torch.library.custom_op("hubert_fast::bias_gelu_dropout_backward", mutates_args=())
def _bias_gelu_dropout_backward(
    grad: Tensor, x: Tensor, bias: Optional[Tensor], dropout_p: float, seed: Optional[Tensor], chosen: str
) -> Tuple[Tensor, Tensor]:
    with without_autocast(x.device):
        x_grad, bias_grad = _implementation(chosen).bias_gelu_dropout_backward(grad, x, bias, dropout_p, seed)
    return x_grad, x.new_empty(0) if bias_grad is None else bias_grad


@_bias_gelu_dropout_backward.register_fake
def _(grad, x, bias, dropout_p, seed, chosen):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _implementation(chosen: str):
    if chosen == "torch":
        return torch_backend
    from hubert_fast.kernels import bias_gelu_dropout as kernels

    return kernels


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.dropout_p, seed, ctx.chosen = inputs
    ctx.save_for_backward(x, bias, seed)


def _backward(ctx, grad):
    x, bias, seed = ctx.saved_tensors
    x_grad, bias_grad = _bias_gelu_dropout_backward(grad, x, bias, ctx.dropout_p, seed, ctx.chosen)
    return x_grad, None if bias is None else bias_grad, None, None, None


_bias_gelu_dropout.register_autograd(_backward, setup_context=_setup_context)
