"""Operator ``mask_fill``: the mask embedding and the padding's zeros, with the bias and dropout of the projection before."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import without_autocast
from hubert_fast.ops.dropout import dropout_seed
from hubert_fast.ops.row_arguments import check_channels, check_rows
from hubert_fast.reference import mask_fill as reference
from hubert_fast.reference.dropout import keep_scale
from hubert_fast.torch_backend import mask_fill as torch_backend
from hubert_fast.torch_backend.dropout_mask import kept_values

backend.register(
    "mask_fill",
    {
        "triton": "one pass forward, one backward with the gradients of bias and embedding; dropout's mask is drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's mask is drawn again",
        "reference": "bias, dropout, padding and embedding one after another",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
)


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
    chosen = backend.choose("mask_fill", lambda name: _objection(name, x, bias, embedding))
    if chosen == "reference":
        kept = kept_values(seed, *x.shape, dropout_p)
        return reference.mask_fill(x, bias, embedding, mask, padding, kept=kept, scale=keep_scale(dropout_p))
    return _mask_fill(x, bias, embedding, mask, padding, dropout_p, seed, chosen)


def _objection(name: str, *tensors: Optional[Tensor]) -> backend.Objection:
    return triton_backend.objection("mask_fill", *tensors) if name == "triton" else None


@torch.library.custom_op("hubert_fast::mask_fill", mutates_args=())
def _mask_fill(
    x: Tensor,
    bias: Optional[Tensor],
    embedding: Tensor,
    mask: Tensor,
    padding: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
    chosen: str,
) -> Tensor:
    with without_autocast(x.device):
        return _implementation(chosen).mask_fill(x, bias, embedding, mask, padding, dropout_p, seed)


@_mask_fill.register_fake
def _(x, bias, embedding, mask, padding, dropout_p, seed, chosen):
    return x.new_empty(x.shape)


@torch.library.custom_op("hubert_fast::mask_fill_backward", mutates_args=())
def _mask_fill_backward(
    grad: Tensor,
    bias: Optional[Tensor],
    embedding: Tensor,
    mask: Tensor,
    padding: Optional[Tensor],
    dropout_p: float,
    seed: Optional[Tensor],
    chosen: str,
) -> Tuple[Tensor, Tensor, Tensor]:
    with without_autocast(grad.device):
        x_grad, bias_grad, embedding_grad = _implementation(chosen).mask_fill_backward(
            grad, bias, embedding, mask, padding, dropout_p, seed
        )
    return x_grad, grad.new_empty(0) if bias_grad is None else bias_grad, embedding_grad


@_mask_fill_backward.register_fake
def _(grad, bias, embedding, mask, padding, dropout_p, seed, chosen):
    bias_grad = grad.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return grad.new_empty(grad.shape), bias_grad, embedding.new_empty(embedding.shape)


def _implementation(chosen: str):
    if chosen == "torch":
        return torch_backend
    from hubert_fast.kernels import mask_fill as kernels

    return kernels


def _setup_context(ctx, inputs, output) -> None:
    _, bias, embedding, mask, padding, ctx.dropout_p, seed, ctx.chosen = inputs
    ctx.save_for_backward(bias, embedding, mask, padding, seed)


def _backward(ctx, grad):
    bias, embedding, mask, padding, seed = ctx.saved_tensors
    x_grad, bias_grad, embedding_grad = _mask_fill_backward(
        grad, bias, embedding, mask, padding, ctx.dropout_p, seed, ctx.chosen
    )
    return x_grad, None if bias is None else bias_grad, embedding_grad, None, None, None, None, None


_mask_fill.register_autograd(_backward, setup_context=_setup_context)
