"""What each operator launches, forward and backward, on meta tensors with the shapes of a model's training step."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.sizes import Size
from hubert_fast.ops import (
    bias_dropout_residual,
    bias_gelu_dropout,
    cosine_cross_entropy,
    cosine_logits,
    mask_fill,
    masked_attention,
    positional_conv,
    residual_layer_norm,
)
from hubert_fast.switches import switched

_DROPOUT = (0.1, 0.0)
# Their forwards are others where nothing is saved.
_OTHER_IN_EVALUATION = ("masked_attention", "positional_conv", "residual_layer_norm")
_MOST_GRADIENTS = 5  # arguments of an operator that have one


def launch_all(operator: str, size: Size, dtype: torch.dtype) -> None:
    """All that training and evaluation in ``dtype`` launch for ``operator``, one of `OPERATORS`."""
    kernels = importlib.import_module(f"hubert_fast.kernels.{operator}")
    for arguments in _ARGUMENTS[operator](size, dtype):
        if operator in _OTHER_IN_EVALUATION and getattr(arguments, "seed", None) is None:
            kernels.forward(arguments, save=False)
        results, saved = kernels.forward(arguments, save=True)
        gradients = [_like(each) for each in results]
        if operator == "masked_attention":  # the backward reads the result
            saved = [*results, *saved]
        elif operator == "residual_layer_norm":  # and here the sum
            gradients[2] = gradients[2] if arguments.with_sum else None
            saved = [results[2], *saved]
        wanted = [True] * _MOST_GRADIENTS
        if operator == "masked_attention":
            wanted[1] = arguments.qkv_bias is not None
        for given in _given(operator, gradients):
            kernels.backward(arguments, saved, given, wanted)


def _given(operator: str, gradients: list[Tensor | None]) -> Iterator[tuple[Tensor | None, ...]]:
    """``gradients`` as they may come: of a normed sum and its narrow copy either may go unused."""
    yield tuple(gradients)
    if operator == "residual_layer_norm" and gradients[1] is not None:
        for unused in range(2):
            yield tuple(None if place == unused else each for place, each in enumerate(gradients))


def _like(result: Tensor | None) -> Tensor | None:
    """A gradient, where there is one."""
    return None if result is None or not result.is_floating_point() else torch.empty_like(result)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """By default a parameter, which stays in float32 under autocast."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _seed(dropout_p: float) -> Tensor | None:
    return _integers() if dropout_p else None


def _bias_dropout_residual(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    """Sums behind a block, and dropout without a residual.

    Only the masked frames leave the last layer. Dropout is alone before the first layer of a post-norm model, and with a bias in
    the projected features where all layers' outputs are wanted.
    """
    x, bias = _empty(size.kept, size.dim, dtype=dtype), _empty(size.dim)
    for dropout_p in _DROPOUT:
        for rows, index in ((size.rows, _integers(size.kept)), (size.kept, None)):
            residual = _empty(rows, size.dim, dtype=dtype)
            yield bias_dropout_residual.Arguments(x, bias, residual, index, dropout_p, _seed(dropout_p))
    rows = _empty(size.rows, size.dim, dtype=dtype)
    for added in (bias, None):
        yield bias_dropout_residual.Arguments(rows, added, None, None, 0.1, _seed(0.1))


def _bias_gelu_dropout(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    x, bias = _empty(size.rows, size.ffn, dtype=dtype), _empty(size.ffn)
    for dropout_p in _DROPOUT:
        yield bias_gelu_dropout.Arguments(x, bias, dropout_p, _seed(dropout_p))


def _cosine_cross_entropy(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    label_embeddings = _empty(size.classes, size.final_dim)
    for rows, index in ((size.kept, None), (size.rows, _integers(size.kept))):
        frames = _empty(rows, size.final_dim, dtype=dtype)
        yield cosine_cross_entropy.Arguments(frames, label_embeddings, _integers(rows), index)


def _cosine_logits(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    frames = _empty(size.kept, size.final_dim, dtype=dtype)
    yield cosine_logits.Arguments(frames, _empty(size.classes, size.final_dim), _integers(size.kept))


def _mask_fill(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    rows = size.batch * size.frames
    x, bias, embedding = _empty(rows, size.dim, dtype=dtype), _empty(size.dim), _empty(size.dim)
    flags = _empty(rows, dtype=torch.bool)
    for dropout_p, padding in itertools.product(_DROPOUT, (flags, None)):
        yield mask_fill.Arguments(x, bias, embedding, flags, padding, dropout_p, _seed(dropout_p))


def _masked_attention(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    qkv = _empty(size.rows, 3, size.heads, size.head_dim, dtype=dtype)
    offsets, bias = _integers(size.batch + 1), _empty(3, size.heads, size.head_dim)
    for key_lengths, dropout_p, qkv_bias in itertools.product((None, _integers(size.batch)), _DROPOUT, (bias, None)):
        settings = size.frames, dropout_p, _seed(dropout_p)
        yield masked_attention.Arguments(qkv, offsets, key_lengths, *settings, qkv_bias)
    of_queries = _integers(size.kept), _integers(size.batch + 1)
    for dropout_p, qkv_bias in itertools.product(_DROPOUT, (bias, None)):
        settings = size.frames, dropout_p, _seed(dropout_p), qkv_bias, None
        yield masked_attention.Arguments(qkv, offsets, None, *settings, *of_queries)


def _positional_conv(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    x, weight = _empty(size.rows, size.dim, dtype=dtype), _empty(size.dim, size.group_channels, size.taps)
    bias, gain, offsets = _empty(size.dim), _empty(1, 1, size.taps), _integers(size.batch + 1)
    for folded in (True, False):
        with switched(folded_filters=folded):
            yield positional_conv.Arguments(x, weight, bias, gain, offsets, size.groups, size.frames)


def _residual_layer_norm(size: Size, dtype: torch.dtype) -> Iterator[tuple]:
    """At each place of a model; a post-norm stream is float32 under autocast, with and without a copy for products."""
    positions, make = size.batch * size.frames, residual_layer_norm.Arguments
    copies = (None,) if dtype == torch.float32 else (None, dtype)
    for index, features in itertools.product((_integers(size.rows), None), (dtype, torch.float32)):
        residual, vectors = _empty(positions, size.conv_channels, dtype=features), _vectors(size.conv_channels, 2)
        yield make(residual, *vectors, None, None, index, 0.0, 0.0, None, 1e-5, dtype, False, None)
    beginnings = itertools.product((torch.float32,), _DROPOUT, copies)  # of a post-norm stream
    for stream, dropout_p, copy in [*beginnings, (dtype, 0.0, None)]:  # before attention in a pre-norm layer
        residual, settings = _empty(size.rows, size.dim, dtype=dtype), (0.0, dropout_p, _seed(dropout_p), 1e-5)
        yield make(residual, *_vectors(size.dim, 2), None, None, None, *settings, stream, False, copy)
    places = [(False, copy) for copy in copies] + [(True, None)]
    for dropout_p, kept, (pre_norm, copy) in itertools.product(_DROPOUT, (None, size.kept), places):
        stream, index = dtype if pre_norm else torch.float32, None if kept is None else _integers(kept)
        residual, update = _empty(size.rows, size.dim, dtype=stream), _empty(kept or size.rows, size.dim, dtype=dtype)
        weight, bias, update_bias = _vectors(size.dim, 3)
        settings = index, dropout_p, 0.0, _seed(dropout_p), 1e-5, stream, pre_norm, copy
        yield make(residual, weight, bias, update, update_bias, *settings)


def _vectors(channels: int, count: int) -> list[Tensor]:
    return [_empty(channels) for _ in range(count)]


_ARGUMENTS = {
    "bias_dropout_residual": _bias_dropout_residual,
    "bias_gelu_dropout": _bias_gelu_dropout,
    "cosine_cross_entropy": _cosine_cross_entropy,
    "cosine_logits": _cosine_logits,
    "mask_fill": _mask_fill,
    "masked_attention": _masked_attention,
    "positional_conv": _positional_conv,
    "residual_layer_norm": _residual_layer_norm,
}
OPERATORS = list(_ARGUMENTS)
