"""Operator ``bias_dropout_residual``: what follows the last product of a block whose LayerNorm comes elsewhere."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.ops.dropout import dropout_seed
from hubert_fast.ops.row_arguments import check_channels, check_residual, check_rows
from hubert_fast.reference import bias_dropout_residual as reference
from hubert_fast.reference.dropout import keep_scale
from hubert_fast.torch_backend import bias_dropout_residual as torch_backend
from hubert_fast.torch_backend.dropout_mask import kept_values

backend.register(
    "bias_dropout_residual",
    {
        "triton": "one pass forward, one backward with the bias's gradient; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, dropout and sum one after another",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
)


def bias_dropout_residual(
    x: Tensor,  # [rows, channels]
    bias: Optional[Tensor],  # [channels]
    residual: Tensor,  # [positions, channels]
    *,
    index: Optional[Tensor] = None,  # [rows] int64
    dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
) -> Tensor:
    """residual[index] + dropout(x + bias).

    Args:
        x: ``[rows, channels]`` float: a product to which no bias was added. It is not kept for the backward.
        bias: ``[channels]`` float, of any dtype, or None.
        residual: ``[positions, channels]`` float, of any dtype; as many positions as rows without an index.
        index: ``[rows]`` int64: the position of each row, each at most once. None: row i is position i.
        dropout_p: probability that a value of ``x + bias`` is dropped, in [0, 1).
        seed: scalar int64 on the device of ``x``, from which the mask follows. None: drawn from torch's default generator.

    Returns:
        ``[rows, channels]`` in the dtype of ``x``.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    check_rows("x", x)
    check_channels(x.shape[1], bias=bias)
    check_residual(residual, *x.shape, index)
    seed = dropout_seed(seed, x.device, dropout_p=dropout_p)
    chosen = backend.choose("bias_dropout_residual", lambda name: _objection(name, x, bias, residual))
    if chosen == "reference":
        kept = kept_values(seed, *x.shape, dropout_p)
        return reference.bias_dropout_residual(x, bias, residual, index, kept=kept, scale=keep_scale(dropout_p))
    return _bias_dropout_residual(x, bias, residual, index, dropout_p, seed, chosen)


def _objection(name: str, *tensors: Optional[Tensor]) -> backend.Objection:
    return triton_backend.objection("bias_dropout_residual", *tensors) if name == "triton" else None


@torch.library.custom_op("hubert_fast::bias_dropout_residual", mutates_args=())
def _bias_dropout_residual(
    x: Tensor,
    bias: Optional[Tensor],
    residual: Tensor,
    index: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
    chosen: str,
) -> Tensor:
    with without_autocast(x.device):
        return _implementation(chosen).bias_dropout_residual(x, bias, residual, index, dropout_p, seed)


@_bias_dropout_residual.register_fake
def _(x, bias, residual, index, dropout_p, seed, chosen):
    return x.new_empty(x.shape)


@torch.library.custom_op("hubert_fast::dropped_gradient", mutates_args=())
def _dropped_gradient(
    grad: Tensor, bias: Optional[Tensor], dropout_p: float, seed: Optional[Tensor], chosen: str
) -> Tuple[Tensor, Tensor]:
    """Gradients of x and bias, from that of dropout(x + bias)."""
    with without_autocast(grad.device):
        x_grad, bias_grad = _implementation(chosen).dropped_gradient(grad, bias, dropout_p, seed)
    return x_grad, grad.new_empty(0) if bias_grad is None else bias_grad


@_dropped_gradient.register_fake
def _(grad, bias, dropout_p, seed, chosen):
    return grad.new_empty(grad.shape), grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _implementation(chosen: str):
    if chosen == "torch":
        return torch_backend
    from hubert_fast.kernels import bias_dropout_residual as kernels

    return kernels


def _setup_context(ctx, inputs, output) -> None:
    x, bias, residual, index, ctx.dropout_p, seed, ctx.chosen = inputs
    ctx.positions, ctx.residual_dtype = len(residual), residual.dtype
    ctx.save_for_backward(bias, index, seed)


def _backward(ctx, grad):
    bias, index, seed = ctx.saved_tensors
    residual_grad = grad.to(ctx.residual_dtype)
    if index is not None:
        zeros = residual_grad.new_zeros(ctx.positions, grad.shape[1])
        residual_grad = zeros.index_copy_(0, index, residual_grad)
    if bias is None and ctx.dropout_p == 0.0:
        return grad, None, residual_grad, None, None, None, None
    x_grad, bias_grad = _dropped_gradient(grad, bias, ctx.dropout_p, seed, ctx.chosen)
    return x_grad, None if bias is None else bias_grad, residual_grad, None, None, None, None


_bias_dropout_residual.register_autograd(_backward, setup_context=_setup_context)
