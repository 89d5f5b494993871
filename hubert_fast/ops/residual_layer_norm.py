"""Operator ``residual_layer_norm``: a block's residual sum and the LayerNorm that follows, and packing before a LayerNorm."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops.arguments import (
    autocast_dtype,
    check_channels,
    check_index,
    check_residual,
    check_rows,
    dropout_seed,
    without_autocast,
)
from hubert_fast.ops.operator import Operator
from hubert_fast.reference import residual_layer_norm as reference
from hubert_fast.reference.dropout import SECOND_MASK, kept_values
from hubert_fast.reference.sums import cast

# A row of the "triton" backend lies in the registers of one program.
_MOST_CHANNELS = 4096


class Arguments(NamedTuple):
    residual: Tensor  # [positions, channels]
    weight: Tensor  # [channels]
    bias: Tensor  # [channels]
    update: Optional[Tensor]  # [rows, channels]
    update_bias: Optional[Tensor]  # [channels]
    index: Optional[Tensor]  # [rows] int64
    update_dropout_p: float
    output_dropout_p: float
    seed: Optional[Tensor]  # [] int64
    eps: float
    dtype: torch.dtype  # of the results
    with_sum: bool
    narrow: Optional[torch.dtype]  # of a copy of what is normed; narrower than ``dtype``

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, channels]."""
        return (self.residual if self.index is None else self.index).shape[0], self.residual.shape[1]

    @property
    def one_gradient(self) -> bool:
        """Whether residual and update have one and the same gradient, which is then written once."""
        plain = self.update is not None and self.index is None and self.update_dropout_p == 0.0
        return plain and self.residual.dtype == self.update.dtype

    def upstream(self, gradients: Tuple[Optional[Tensor], ...]) -> Tuple[Optional[Tensor], ...]:
        """``gradients`` of the normed sum, of its copy where the former has one too, and of the sum."""
        grad, copy_grad, sum_grad = gradients
        # In `torch.library` empty tensors stand for absent results, and there may be gradients of these.
        copy_grad = None if self.narrow is None else copy_grad
        sum_grad = None if self.update is None else sum_grad
        return (copy_grad, None, sum_grad) if grad is None else (grad, copy_grad, sum_grad)


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
    narrow: Optional[torch.dtype] = None,
) -> Union[Tensor, Tuple[Tensor, ...]]:
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
        narrow: dtype of a copy of the normed sum that is wanted besides, narrower than ``dtype``: under autocast a stream in
            float32 goes into products in 16 bits. The backward takes gradients of both. Where it is ``dtype`` itself, the
            copy is the normed sum. None: there is no copy.

    Returns:
        The normed sum, or a tuple of it, the copy where ``narrow`` is given, and the sum ``with_sum``: ``[rows, channels]``
        each.

    Raises:
        ValueError: for a wrong rank, shape, dtype, probability or seed.
    """
    dtype = dtype or _result_dtype(residual, update)
    copied = None if narrow == dtype else narrow
    if copied is not None and not (copied.is_floating_point and copied.itemsize < dtype.itemsize):
        raise ValueError(
            f"narrow must be a floating dtype narrower than the results' {dtype}, or the same; got {narrow}"
        )
    _check(residual, weight, bias, update, update_bias, index)
    seed = dropout_seed(seed, residual.device, update_dropout_p=update_dropout_p, output_dropout_p=output_dropout_p)
    if with_sum and update is None:
        residual = (residual if index is None else residual.index_select(0, index)).to(dtype)
        index = None
    settings = update_dropout_p, output_dropout_p, seed, eps, dtype, with_sum, copied
    normed, copy, summed = _operator(Arguments(residual, weight, bias, update, update_bias, index, *settings))
    results = [normed]
    if narrow is not None:
        results.append(normed if copied is None else copy)
    if with_sum:
        results.append(residual if update is None else summed)
    return tuple(results) if len(results) > 1 else normed


def _check(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    update: Optional[Tensor],
    update_bias: Optional[Tensor],
    index: Optional[Tensor],
) -> None:
    if update is None:
        if update_bias is not None:
            raise ValueError("update_bias was given without an update to add it to")
        check_rows("residual", residual)
        check_index(index)
    else:
        check_rows("update", update)
        check_residual(residual, *update.shape, index)
    check_channels(residual.shape[1], weight=weight, bias=bias, update_bias=update_bias)


def _result_dtype(residual: Tensor, update: Optional[Tensor]) -> torch.dtype:
    if update is None:
        return autocast_dtype(residual.device) or residual.dtype
    return torch.promote_types(update.dtype, residual.dtype)


def _objection(name: str, arguments: Arguments) -> backend.Objection:
    channels = arguments.residual.shape[1]
    if name == "triton" and channels > _MOST_CHANNELS:
        return f"it holds whole rows of up to {_MOST_CHANNELS} channels; got {channels}"
    return None


def _reference(arguments: Arguments) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    residual, weight, bias, update, update_bias, index, update_p, output_p, seed, eps, dtype, _, narrow = arguments
    with without_autocast(residual.device):
        kept = kept_values(seed, *arguments.shape, update_p)
        update = None if update is None else cast(update, dtype)
        summed = reference.residual_sum(residual, update, update_bias, index, kept=kept)
        kept = kept_values(None if seed is None else seed ^ SECOND_MASK, *arguments.shape, output_p)
        normed = reference.layer_norm_dropout(summed, weight, bias, eps=eps, kept=kept)
        normed = cast(normed, dtype)
    return normed, None if narrow is None else normed.to(narrow), None if update is None else summed


def _fake(arguments: Arguments, save: bool) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    normed, narrow = arguments.residual.new_empty(arguments.shape, dtype=arguments.dtype), arguments.narrow
    copy = None if narrow is None else torch.empty_like(normed, dtype=narrow)
    absent = arguments.update is None or not (save or arguments.with_sum)
    return normed, copy, None if absent else torch.empty_like(normed)


_operator = Operator(
    "residual_layer_norm",
    Arguments,
    backends={
        "triton": "one pass forward, one backward with the parameters' gradients; dropout's masks are drawn again",
        "torch": "PyTorch's passes, on a CPU over rows that stay in cache; dropout's masks are drawn again",
        "reference": "bias, dropout, sum, layer_norm and dropout one after another",
    },
    reference=_reference,
    results=["normed", "copy", "summed"],
    fake=_fake,
    gradients=["residual", "weight", "bias", "update", "update_bias"],
    kept=["residual", "weight", "bias", "update_bias", "index", "seed"],
    unread=lambda arguments: () if arguments.update is None else ("residual",),
    kept_results=["summed"],
    one_gradient=lambda arguments: ("residual", "update") if arguments.one_gradient else None,
    objection=_objection,
    whole_passes_win=lambda arguments: True,  # benchmarks/NOTES.md, "Whole passes on a CPU": from 49 rows to 5,992
)
