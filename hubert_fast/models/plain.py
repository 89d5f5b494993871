"""Fused operators in place of modules, as long as a module is nothing but its formula.

What somebody hooked, wrapped, sharded by itself or put in a module's place is called as a module, and only what stands between
the modules is fused.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubert_fast import backend, cpu
from hubert_fast.models.wrappers import all_asleep, runs_as
from hubert_fast.ops.arguments import autocast_dtype
from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual
from hubert_fast.ops.linear import linear as linear_product
from hubert_fast.ops.operator import is_plain_call
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from hubert_fast.switches import switches


class Stream(NamedTuple):
    """The residual stream, and its copy in the dtype of the products where that is another."""

    x: Tensor  # [rows, dim]
    narrow: Optional[Tensor] = None  # [rows, dim]

    @property
    def operand(self) -> Tensor:
        """The stream as a product takes it."""
        return self.x if self.narrow is None else self.narrow


def wanted_rows(stream: Stream, keep: Optional[Tensor]) -> Stream:
    """The rows of a stream that ``keep`` ([kept] int64) names; None: all."""
    if keep is None:
        return stream
    return Stream(*(None if each is None else each.index_select(0, keep) for each in stream))


class Update(NamedTuple):
    """``dropout(value + bias)``, not yet made: what a sub-layer adds to the residual stream."""

    value: Tensor  # [rows, dim]
    bias: Optional[Tensor]  # [dim]
    dropout_p: float
    seed: Optional[Tensor]  # [] int64


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is nothing but ``kind``'s own forward."""
    return (
        (type(module) is kind or runs_as(type(module)) is kind)
        and not (module._forward_hooks and not all_asleep(module._forward_hooks))
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
    )


def before_dropout(dropout: nn.Module, value: Tensor, bias: Optional[Tensor], seed: Optional[Tensor] = None) -> Update:
    """What a pass that drops values is to be given for ``dropout(value + bias)``."""
    if is_fusable(dropout):
        return Update(value, bias, rate(dropout), seed)
    return Update(dropout(value if bias is None else value + bias), None, 0.0, None)


def drop(dropout: nn.Module, x: Tensor, seed: Optional[Tensor]) -> Tensor:
    """``dropout(x)``, whose mask follows from ``seed`` where that is given."""
    if not is_fusable(dropout):
        return dropout(x)
    return bias_dropout_residual(x, None, None, dropout_p=rate(dropout), seed=seed) if rate(dropout) else x


def is_fusable(dropout: nn.Module) -> bool:
    """Whether a pass may do what ``dropout`` does. One that drops everything has no scale for what it keeps."""
    return is_plain(dropout, nn.Dropout) and dropout.p < 1.0


def rate(dropout: nn.Dropout) -> float:
    """The probability that ``dropout`` drops a value, now."""
    return dropout.p if dropout.training else 0.0


def composes(x: Tensor) -> bool:
    """Whether PyTorch's own functions, one after another, take the least time on ``x`` where nothing is dropped.

    They do on a CPU, where launches cost nothing (benchmarks/NOTES.md, "Whole passes on a CPU"). What was asked for by name runs.
    """
    return cpu.is_cpu(x.device) and backend.all_automatic()


def stream_dtype(x: Tensor) -> Optional[torch.dtype]:
    """What the residual stream is kept in: CUDA's autocast has LayerNorm give float32, and a post-norm stream is made of those.

    None is the dtype at hand.
    """
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else None


def narrow_dtype(x: Tensor, dtype: torch.dtype) -> Optional[torch.dtype]:
    """The dtype that products of a stream in ``dtype`` take, where it is another; ``x`` says on which device."""
    narrow = autocast_dtype(x.device)
    return narrow if dtype == torch.float32 and switches.narrow_copies else None


def product(linear: nn.Module, x: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    """``linear(x)`` less its bias, and the bias, for the pass that follows to add. On a CPU the product itself adds it."""
    if not is_plain(linear, nn.Linear) or composes(x):
        return projection(linear, x), None
    return linear_product(x, [linear.weight]), linear.bias


def projection(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``; a plain one may have a copy of its weight in 16 bits (`hubert_fast.weights`)."""
    if not is_plain(linear, nn.Linear):
        return linear(x)
    return linear_product(x, [linear.weight], [] if linear.bias is None else [linear.bias])


def gelu_of_product(linear: nn.Module, x: Tensor) -> Tensor:
    """``gelu(linear(x))`` on a CPU: ``[rows, in] -> [rows, out]``."""
    if (
        is_plain(linear, nn.Linear)
        and not torch.is_grad_enabled()
        and not cpu.in_forward_mode()
        and is_plain_call(operands := (x, linear.weight, linear.bias))
        and cpu.has_gelu(dtype := _multiplied_in(*operands))
    ):
        return cpu.product(*(None if each is None else each.to(dtype) for each in operands), gelu=True)
    return F.gelu(projection(linear, x))


def _multiplied_in(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Optional[torch.dtype]:
    """The dtype that all have or autocast casts all to. None: they are PyTorch's to refuse, or to leave alone."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x.dtype if x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype) else None
    return None if x.dtype == torch.float64 else dtype


def add(residual: Optional[Tensor], update: Update, index: Optional[Tensor] = None) -> Tensor:
    """The stream after ``update``; ``index`` says which rows of ``residual`` go on. Without a residual, the update itself."""
    if _is_sum(update) and composes(update.value):
        if residual is None:
            return update.value
        return (residual if index is None else residual.index_select(0, index)) + update.value
    return bias_dropout_residual(
        update.value, update.bias, residual, index=index, dropout_p=update.dropout_p, seed=update.seed
    )


def normalize(norm: nn.Module, residual: Tensor, index: Optional[Tensor] = None) -> Tensor:
    """``norm(residual[index])``."""
    if not _is_layer_norm(norm) or composes(residual):
        return norm(residual if index is None else residual.index_select(0, index))
    return residual_layer_norm(residual, norm.weight, norm.bias, index=index, eps=norm.eps)


def normalized_stream(
    norm: nn.Module, x: Tensor, dropout: Optional[nn.Module] = None, seed: Optional[Tensor] = None
) -> Stream:
    """``dropout(norm(x))`` as a stream, which under autocast is wider than ``x``; ``seed`` as in `residual_layer_norm`."""
    if not _is_layer_norm(norm):
        x = norm(x)
        return Stream(x if dropout is None else dropout(x))
    fused, dtype = dropout is None or is_fusable(dropout), stream_dtype(x)
    narrow = narrow_dtype(x, dtype) if fused and dtype is not None else None
    p = rate(dropout) if fused and dropout is not None else 0.0
    settings = {"output_dropout_p": p, "seed": seed, "eps": norm.eps, "dtype": dtype, "narrow": narrow}
    result = residual_layer_norm(x, norm.weight, norm.bias, **settings)
    if narrow is not None:
        return Stream(*result)
    return Stream(result if fused else dropout(result))


def add_then_normalize(norm: nn.Module, residual: Tensor, update: Update, index: Optional[Tensor] = None) -> Stream:
    """``norm`` of the stream after ``update`` (post-norm)."""
    if not _is_layer_norm(norm) or _is_sum(update) and index is None and composes(residual):
        return Stream(norm(add(residual, update, index)))
    narrow = narrow_dtype(residual, torch.promote_types(residual.dtype, update.value.dtype))
    result = residual_layer_norm(residual, norm.weight, norm.bias, **_settings(norm, update, index), narrow=narrow)
    return Stream(result) if narrow is None else Stream(*result)


def add_and_normalize(
    norm: nn.Module, residual: Tensor, update: Update, index: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """(``norm`` of the stream after ``update``, that stream) (pre-norm)."""
    if not _is_layer_norm(norm) or _is_sum(update) and composes(residual):
        stream = add(residual, update, index)
        return norm(stream), stream
    return residual_layer_norm(residual, norm.weight, norm.bias, **_settings(norm, update, index), with_sum=True)


def _is_sum(update: Update) -> bool:
    """Whether ``update`` is there already, to be added as it is."""
    return update.bias is None and update.dropout_p == 0.0


def _settings(norm: nn.LayerNorm, update: Update, index: Optional[Tensor]) -> dict[str, Any]:
    return {
        "update": update.value,
        "update_bias": update.bias,
        "index": index,
        "update_dropout_p": update.dropout_p,
        "seed": update.seed,
        "eps": norm.eps,
    }


def _is_layer_norm(norm: nn.Module) -> bool:
    return is_plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and norm.bias is not None
