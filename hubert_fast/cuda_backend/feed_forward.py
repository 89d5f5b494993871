"""Feed-forward block on a GPU: GELU in the epilogue of the first product, its derivative in that of the data gradient.

Kept are the input and z, the values before GELU. The backward's first product writes GELU(z) too, which the gradient of the
second weight is made of; so the hidden values need no memory between forward and backward, and no pass of their own in either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from hubert_fast import extension
from hubert_fast.cuda_backend import device
from hubert_fast.weights import gradient_memory, in_dtype, weight_gradient

if TYPE_CHECKING:
    from hubert_fast.ops.feed_forward import Arguments

_DTYPES = (torch.bfloat16, torch.float16)
_MOST_ROWS = (1 << 31) - 256


def objection(arguments: Arguments) -> Optional[str]:
    """Why this backend, which is there, cannot take these inputs, or None where it can."""
    x, weight1, _, _, dropout_p, _, dtype = arguments
    reason = device.objection("x", x)
    if reason is not None:
        return reason
    if dtype not in _DTYPES:
        return f"it computes in {', '.join(map(str, _DTYPES))}, not {dtype}"
    if dropout_p > 0.0:
        return f"it drops nothing; got a dropout_p of {dropout_p}"
    (rows, dim), hidden = x.shape, len(weight1)
    if dim % 8 or hidden % 8 or not 0 < rows <= _MOST_ROWS:
        return f"it takes 1 to {_MOST_ROWS} rows, and multiples of 8 as dim and hidden; got {rows} rows, {dim} and {hidden}"
    kernels = extension.cuda()
    if kernels is None:
        return None  # `extension.why_not` tells
    device.stream_of(kernels, x.device)
    has = kernels.tensor_core_products_available(device.NUMBERS[dtype])
    return None if has else f"this build has no products of {dtype} for {x.device} (HUBERT_FAST_CUDA_ARCHS)"


def saved_tensors(arguments: Arguments) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The values before GELU."""
    return [((arguments.x.shape[0], arguments.weight1.shape[0]), arguments.dtype)]


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    """The arguments must be such that `objection` has none."""
    x, weight1, bias1, weight2, *_, dtype = arguments
    with torch.cuda.device_of(x):
        z = _hidden(arguments) if save else None
        activation = _hidden(arguments)
        bias = _dense(bias1, torch.promote_types(dtype, torch.float32))
        given = arguments, _dense(x, dtype), in_dtype([weight1], dtype)
        _multiply("product_gelu", *given, bias=bias, z=z, activation=activation)
        return (activation @ in_dtype([weight2], dtype).t(),), [z] if save else []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> list[Optional[Tensor]]:
    """Gradients of weights and bias are written where memory is lent for them."""
    (x, weight1, bias1, weight2, *_, dtype), (z,), (gradient,) = arguments, saved, gradients
    wants_x, wants_weight1, wants_bias1, wants_weight2 = wanted
    of_x = of_weight1 = of_bias1 = of_weight2 = None
    with torch.cuda.device_of(x):
        upstream, of_z = _dense(gradient, dtype), _hidden(arguments)
        activation = _hidden(arguments) if wants_weight2 else None
        results = {"out": of_z, "activation": activation, "out_stride": of_z.stride(0)}
        _multiply("product_gelu_gradient", arguments, upstream, in_dtype([weight2], dtype), z=z, **results)
        if wants_weight2:
            of_weight2 = weight_gradient(upstream, activation, weight2.dtype, gradient_memory([weight2]))
        if wants_bias1:
            of_bias1 = torch.sum(of_z, 0, dtype=bias1.dtype, out=gradient_memory([bias1]))
        if wants_weight1:
            of_weight1 = weight_gradient(of_z, _dense(x, dtype), weight1.dtype, gradient_memory([weight1]))
        if wants_x:
            of_x = (of_z @ in_dtype([weight1], dtype)).to(x.dtype)
    return [of_x, of_weight1, of_bias1, of_weight2]


def _multiply(name: str, arguments: Arguments, rows: Tensor, weight: Tensor, **more: Any) -> None:
    """Call the kernel of that name on ``rows`` [rows, dim]; the product is [rows, hidden]."""
    (count, dim), hidden, kernels = rows.shape, len(arguments.weight1), extension.cuda()
    weight = _dense(weight, arguments.dtype)
    sizes = {"rows": count, "columns": hidden, "depth": dim}
    operands = kernels.Product(input=rows, input_stride=dim, weight=weight, **sizes)
    stream = device.stream_of(kernels, rows.device)
    getattr(kernels, name)(operands, dtype=device.NUMBERS[arguments.dtype], stream=stream, **more)


def _hidden(arguments: Arguments) -> Tensor:
    """Room for [rows, hidden]."""
    return arguments.x.new_empty(len(arguments.x), len(arguments.weight1), dtype=arguments.dtype)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as the kernels take it."""
    return device.aligned(tensor.to(dtype).contiguous())
