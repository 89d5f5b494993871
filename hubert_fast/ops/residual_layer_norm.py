"""Operator ``residual_layer_norm``: a block's residual sum and the LayerNorm that follows, and packing before a LayerNorm."""

from __future__ import annotations

from typing import Optional, Tuple, Union

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from hubert_fast.ops.autocast import autocast_dtype, without_autocast
from hubert_fast.ops.dropout import dropout_seed
from hubert_fast.ops.row_arguments import check_channels, check_index, check_residual, check_rows
from hubert_fast.reference import residual_layer_norm as reference
from hubert_fast.reference.dropout import keep_scale
from hubert_fast.torch_backend import residual_layer_norm as torch_backend
from hubert_fast.torch_backend.dropout_mask import SECOND_MASK, kept_values

backend.register(
    "residual_layer_norm",
    {
        "triton": "one pass forward, one backward with the parameters' gradients; dropout's masks are drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's masks are drawn again",
        "reference": "bias, dropout, sum, layer_norm and dropout one after another",
    },
    unavailable={"triton": triton_backend.why_not()},
    on_gpu=("triton",),
)

# A row of the "triton" backend lies in the registers of one program.
_MOST_CHANNELS = 4096


def residual_layer_norm(
    residual: Tensor,  # [positions, channels]
    weight: Tensor,  # [channels]
    bias: Tensor,  # [channels]
    *,
    update: Optional[Tensor] = None,  # [rows, channels]
    update_bias: Optional[Tensor] = None,  # [channels]
    index: Optional[Tensor] = None,  # [rows] int64
    update_dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    seed: Optional[Tensor] = None,  # [] int64
    eps: float = 1e-5,
    with_sum: bool = False,
    dtype: Optional[torch.dtype] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """sum = residual[index] + dropout(update + update_bias); normed = dropout(layer_norm(sum) * weight + bias).

    A post-norm transformer goes on with the normed sum alone, a pre-norm one with both (Xiong et al. 2020, figure 1).

    Args:
        residual: ``[positions, channels]`` float, of any dtype; as many positions as rows without an index.
        weight, bias: ``[channels]`` float, of any dtype: LayerNorm's parameters.
        update: ``[rows, channels]`` float: a product to which no bias was added, not kept for the backward. None: the sum
            is ``residual[index]``.
        update_bias: ``[channels]`` float, of any dtype, or None.
        index: ``[rows]`` int64: the position of each row, each at most once. None: row i is position i.
        update_dropout_p, output_dropout_p: probabilities that a value of ``update + update_bias``, or of the normed sum, is
            dropped; in [0, 1).
        seed: scalar int64 on the device of ``residual``, from which both masks follow. None: drawn from torch's default
            generator.
        eps: added to the variance.
        with_sum: whether the sum is wanted too.
        dtype: of the results. None: the wider of those of ``update`` and ``residual``; without an update, autocast's where it
            is on, else that of ``residual``.

    Returns:
        The normed sum, or (normed, sum): ``[rows, channels]`` each.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    dtype = dtype or _result_dtype(residual, update)
    _check(residual, weight, bias, update, update_bias, index)
    seed = dropout_seed(seed, residual.device, update_dropout_p=update_dropout_p, output_dropout_p=output_dropout_p)
    chosen = backend.choose(
        "residual_layer_norm", lambda name: _objection(name, residual, weight, bias, update, update_bias)
    )
    if with_sum and update is None:
        residual = (residual if index is None else residual.index_select(0, index)).to(dtype)
        index = None
    settings = update_dropout_p, output_dropout_p, seed, eps, dtype
    if chosen == "reference":
        with without_autocast(residual.device):
            normed, summed = _reference(residual, weight, bias, update, update_bias, index, *settings)
    else:
        inputs = (residual, weight, bias, update, update_bias)
        save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
        normed, summed, _, _ = _residual_layer_norm(*inputs, index, *settings, save or with_sum, chosen)
    if not with_sum:
        return normed
    return normed, residual if update is None else summed


def _check(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    update: Optional[Tensor],
    update_bias: Optional[Tensor],
    index: Optional[Tensor],
) -> None:
    check_rows("residual", residual)
    check_channels(residual.shape[1], weight=weight, bias=bias, update_bias=update_bias)
    if update is None:
        if update_bias is not None:
            raise ValueError("update_bias was given without an update to add it to")
        check_index(index)
        return
    check_rows("update", update)
    check_residual(residual, *update.shape, index)


def _result_dtype(residual: Tensor, update: Optional[Tensor]) -> torch.dtype:
    if update is None:
        return autocast_dtype(residual.device) or residual.dtype
    return torch.promote_types(update.dtype, residual.dtype)


def _objection(name: str, residual: Tensor, *parameters: Optional[Tensor]) -> backend.Objection:
    if name != "triton":
        return None
    reason = triton_backend.objection("residual_layer_norm", residual, *parameters)
    if reason is None and residual.shape[1] > _MOST_CHANNELS:
        reason = f"it holds whole rows of up to {_MOST_CHANNELS} channels; got {residual.shape[1]}"
    return reason


def _reference(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    update: Optional[Tensor],
    update_bias: Optional[Tensor],
    index: Optional[Tensor],
    update_dropout_p: float,
    output_dropout_p: float,
    seed: Optional[Tensor],
    eps: float,
    dtype: torch.dtype,
) -> Tuple[Tensor, Tensor]:
    rows, channels = len(residual) if index is None else len(index), residual.shape[1]
    kept = kept_values(seed, rows, channels, update_dropout_p)
    scale = keep_scale(update_dropout_p)
    update = None if update is None else update.to(dtype)
    summed = reference.residual_sum(residual, update, update_bias, index, kept=kept, scale=scale)
    kept = kept_values(None if seed is None else seed ^ SECOND_MASK, rows, channels, output_dropout_p)
    scale = keep_scale(output_dropout_p)
    normed = reference.layer_norm_dropout(summed, weight, bias, eps=eps, kept=kept, scale=scale)
    return normed.to(dtype), summed


@torch.library.custom_op("hubert_fast::residual_layer_norm", mutates_args=())
def _residual_layer_norm(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    update: Optional[Tensor],
    update_bias: Optional[Tensor],
    index: Optional[Tensor],
    update_dropout_p: float,
    output_dropout_p: float,
    seed: Optional[Tensor],
    eps: float,
    dtype: torch.dtype,
    keep_sum: bool,
    chosen: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normed sum, the sum (empty without an update, and where it is not to be kept), means and reciprocal deviations."""
    with without_autocast(residual.device):
        normed, summed, mean, rstd = _implementation(chosen).residual_layer_norm(
            residual, weight, bias, update, update_bias, index,
            update_dropout_p, output_dropout_p, seed, eps, dtype, keep_sum,
        )  # fmt: skip
    return normed, normed.new_empty(0) if summed is None else summed, mean, rstd


@_residual_layer_norm.register_fake
def _(residual, weight, bias, update, update_bias, index, update_dropout_p, output_dropout_p, seed, eps, dtype, keep_sum,
      chosen):  # fmt: skip
    rows = residual.shape[0] if index is None else index.shape[0]
    normed = residual.new_empty(rows, residual.shape[1], dtype=dtype)
    wide = torch.promote_types(residual.dtype if update is None else update.dtype, torch.float32)
    statistics = (residual.new_empty(rows, dtype=wide) for _ in range(2))
    summed = normed.new_empty(0) if update is None or not keep_sum else normed.new_empty(normed.shape)
    return normed, summed, *statistics


@torch.library.custom_op("hubert_fast::residual_layer_norm_backward", mutates_args=())
def _residual_layer_norm_backward(
    grad: Tensor,
    sum_grad: Optional[Tensor],
    residual: Tensor,
    summed: Optional[Tensor],
    index: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    update_bias: Optional[Tensor],
    update_dropout_p: float,
    output_dropout_p: float,
    seed: Optional[Tensor],
    update_dtype: torch.dtype,
    chosen: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, update (empty without one, and where `_one_gradient`), update_bias (or empty), weight, bias."""
    with without_autocast(grad.device):
        gradients = _implementation(chosen).residual_layer_norm_backward(
            grad, sum_grad, residual, summed, index, mean, rstd, weight, bias, update_bias,
            update_dropout_p, output_dropout_p, seed, update_dtype,
            _one_gradient(residual, summed, index, update_dropout_p, update_dtype),
        )  # fmt: skip
    return tuple(grad.new_empty(0) if each is None else each for each in gradients)


@_residual_layer_norm_backward.register_fake
def _(grad, sum_grad, residual, summed, index, mean, rstd, weight, bias, update_bias, update_dropout_p, output_dropout_p,
      seed, update_dtype, chosen):  # fmt: skip
    none = summed is None or _one_gradient(residual, summed, index, update_dropout_p, update_dtype)
    update_grad = grad.new_empty(0) if none else summed.new_empty(summed.shape, dtype=update_dtype)
    update_bias_grad = grad.new_empty(0) if update_bias is None else update_bias.new_empty(update_bias.shape)
    others = (weight.new_empty(weight.shape), bias.new_empty(bias.shape))
    return residual.new_empty(residual.shape), update_grad, update_bias_grad, *others


def _one_gradient(
    residual: Tensor,
    summed: Optional[Tensor],
    index: Optional[Tensor],
    update_dropout_p: float,
    update_dtype: torch.dtype,
) -> bool:
    """Whether residual and update have one and the same gradient, which is then written once."""
    return summed is not None and index is None and update_dropout_p == 0.0 and residual.dtype == update_dtype


def _implementation(chosen: str):
    if chosen == "torch":
        return torch_backend
    from hubert_fast.kernels import residual_layer_norm as kernels

    return kernels


def _setup_context(ctx, inputs, output) -> None:
    residual, weight, bias, update, update_bias, index, ctx.update_dropout_p, ctx.output_dropout_p, seed = inputs[:9]
    ctx.chosen = inputs[-1]
    normed, summed, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.dtype = normed.dtype
    ctx.update_dtype = normed.dtype if update is None else update.dtype
    if update is None:
        summed = None
    ctx.save_for_backward(residual, summed, index, mean, rstd, weight, bias, update_bias, seed)


def _backward(ctx, grad, sum_grad, _mean_grad, _rstd_grad):
    residual, summed, index, mean, rstd, weight, bias, update_bias, seed = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros(mean.shape[0], residual.shape[1], dtype=ctx.dtype, device=residual.device)
    if summed is None:
        sum_grad = None  # of an empty tensor
    residual_grad, update_grad, update_bias_grad, weight_grad, bias_grad = _residual_layer_norm_backward(
        grad, sum_grad, residual, summed, index, mean, rstd, weight, bias, update_bias,
        ctx.update_dropout_p, ctx.output_dropout_p, seed, ctx.update_dtype, ctx.chosen,
    )  # fmt: skip
    if summed is None:
        update_grad = None
    elif _one_gradient(residual, summed, index, ctx.update_dropout_p, ctx.update_dtype):
        update_grad = residual_grad
    update_bias_grad = None if update_bias is None else update_bias_grad
    return residual_grad, weight_grad, bias_grad, update_grad, update_bias_grad, *(None,) * 8


_residual_layer_norm.register_autograd(_backward, setup_context=_setup_context)
