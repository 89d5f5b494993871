"""A residual sum and its LayerNorm, as the formula says.

Source: Ba et al. 2016 (LayerNorm); Vaswani et al. 2017, section 5.4 (dropout of what is added); the orders are those of
post-norm and pre-norm transformers (Xiong et al. 2020, figure 1).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast.reference.bias_dropout_residual import bias_dropout_residual
from hubert_fast.reference.dropout import Kept, dropped
from hubert_fast.reference.sums import cast


def residual_sum(
    residual: Tensor,  # [positions, channels]
    update: Optional[Tensor],  # [rows, channels]
    update_bias: Optional[Tensor],  # [channels]
    index: Optional[Tensor],  # [rows] int64: the position of each row
    *,
    kept: Optional[Kept] = None,  # of the update
) -> Tensor:  # [rows, channels], in the dtype of the update, or of the residual where there is none
    if update is None:
        return residual if index is None else residual.index_select(0, index)
    return bias_dropout_residual(update, update_bias, residual, index, kept=kept)


def layer_norm_dropout(
    x: Tensor,  # [rows, channels]
    weight: Tensor,  # [channels]
    bias: Tensor,  # [channels]
    *,
    eps: float,
    kept: Optional[Kept] = None,
) -> Tensor:  # [rows, channels], in the dtype of x
    if x.dtype == weight.dtype == bias.dtype:
        return dropped(F.layer_norm(x, weight.shape, weight, bias, eps), kept)
    mixed = x.device.type == "cpu" and weight.dtype == bias.dtype == torch.float32
    if mixed and kept is None and x.dtype != torch.float64 and not torch.is_grad_enabled():
        # In float32 on the way, and rounded once; but the gradients of its parameters are summed in the dtype of x.
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = x.to(weight.dtype) if weight.dtype.itemsize > x.dtype.itemsize else x
    weight, bias = cast(weight, wide.dtype), cast(bias, wide.dtype)
    return cast(dropped(F.layer_norm(wide, weight.shape, weight, bias, eps), kept), x.dtype)
