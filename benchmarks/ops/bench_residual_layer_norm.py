"""``residual_layer_norm``: post-norm and pre-norm blocks, and packing, in a model's shapes.

python -m benchmarks.ops.bench_residual_layer_norm
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F

from hubert_fast.ops.residual_layer_norm import residual_layer_norm

from ..report import dtype_name
from ..sizes import Size
from .case import OperatorCase, Tensors
from .command_line import main
from .rows import parameter, row_cases, rows, some_of, stream_dtype

OPERATOR = "residual_layer_norm"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for dropout_p in (0.1, 0.0):
        for with_sum in (False, True):
            yield from _block(size, dtype, device, dropout_p, with_sum=with_sum)
            if stream_dtype(dtype, device, pre_norm=with_sum) != dtype:
                yield from _block(size, dtype, device, dropout_p, with_sum=with_sum, with_copy=True)
        yield from _packing(size, dtype, device, dropout_p)


def _block(
    size: Size, dtype: torch.dtype, device: str, dropout_p: float, *, with_sum: bool, with_copy: bool = False
) -> Iterator[OperatorCase]:
    """Post-norm, or pre-norm ``with_sum``. The update is a product's, in ``dtype``; what comes out is as wide as the stream, and
    ``with_copy`` in ``dtype`` too.
    """
    stream = stream_dtype(dtype, device, pre_norm=with_sum)
    stream_bytes, update_bytes = (size.rows * size.dim * each.itemsize for each in (stream, dtype))

    def draw(generator: torch.Generator) -> tuple[Tensors, Tensors]:
        residual, update = (rows(generator, size.rows, size.dim, each) for each in (stream, dtype))
        vectors = [parameter(generator, size.dim) for _ in range(3)]
        outputs = [stream, *[dtype] * with_copy, *[stream] * with_sum]
        directions = [rows(generator, size.rows, size.dim, each) for each in outputs]
        return (residual, update, *vectors), tuple(directions)

    block = f"{'pre' if with_sum else 'post'}-norm" + ("" if stream == dtype else ", float32 stream")
    block += ", copied" if with_copy else ""
    # Residual, normed, the sum where it is wanted; update, the copy where it is wanted.
    forward = (2 + with_sum) * stream_bytes + (1 + with_copy) * update_bytes
    # The sum, where it is kept for this alone; gradient of normed, sum, gradient of the residual; gradient of the sum, and that
    # of the update where it is another; gradient of the copy.
    kept, another = 1 - with_sum, dropout_p > 0.0 or stream != dtype
    backward = (kept + 3 + with_sum) * stream_bytes + (another + with_copy) * update_bytes
    wanted = {"with_sum": with_sum, "narrow": dtype if with_copy else None}
    return row_cases(
        OPERATOR, size, dtype, device, dropout_p,
        name=f"{block}, {size.rows} x {size.dim}",
        shape={
            "rows": size.rows, "channels": size.dim, "pre_norm": with_sum, "stream": dtype_name(stream), "copy": with_copy,
        },
        draw=draw,
        functions=(partial(_our_block, **wanted), partial(_plain_block, **wanted)),
        least_bytes=(forward, backward),
    )  # fmt: skip


def _our_block(tensors: Tensors, dropout_p: float, *, with_sum: bool, narrow: Optional[torch.dtype]) -> Tensors:
    residual, update, weight, bias, update_bias, seed = tensors
    out = residual_layer_norm(
        residual, weight, bias, update=update, update_bias=update_bias, update_dropout_p=dropout_p, seed=seed,
        with_sum=with_sum, narrow=narrow,
    )  # fmt: skip
    return out if isinstance(out, tuple) else (out,)


def _plain_block(tensors: Tensors, dropout_p: float, *, with_sum: bool, narrow: Optional[torch.dtype]) -> Tensors:
    residual, update, weight, bias, update_bias, _ = tensors
    dtype, dim = residual.dtype, residual.shape[1:]
    summed = residual + F.dropout(update + update_bias.to(update.dtype), dropout_p)
    normed = F.layer_norm(summed, dim, weight.to(dtype), bias.to(dtype))
    return normed, *([] if narrow is None else [normed.to(narrow)]), *([summed] if with_sum else [])


def _packing(size: Size, dtype: torch.dtype, device: str, dropout_p: float) -> Iterator[OperatorCase]:
    """The rows of the valid frames are taken out of the padded grid on the way into LayerNorm."""
    positions, row_bytes = size.batch * size.frames, size.dim * dtype.itemsize

    def draw(generator: torch.Generator) -> tuple[Tensors, Tensors]:
        residual, direction = (rows(generator, count, size.dim, dtype) for count in (positions, size.rows))
        vectors = [parameter(generator, size.dim) for _ in range(2)]
        return (residual, *vectors, some_of(generator, positions, size.rows)), (direction,)

    return row_cases(
        OPERATOR, size, dtype, device, dropout_p,
        name=f"packing, {size.rows} of {positions} x {size.dim}",
        shape={"rows": size.rows, "positions": positions, "channels": size.dim},
        draw=draw,
        functions=(_our_packing, _plain_packing),
        least_bytes=(2 * size.rows * row_bytes, (2 * size.rows + positions) * row_bytes),
    )  # fmt: skip


def _our_packing(tensors: Tensors, dropout_p: float) -> Tensors:
    residual, weight, bias, index, seed = tensors
    return (residual_layer_norm(residual, weight, bias, index=index, output_dropout_p=dropout_p, seed=seed),)


def _plain_packing(tensors: Tensors, dropout_p: float) -> Tensors:
    residual, weight, bias, index, _ = tensors
    dtype, dim = residual.dtype, residual.shape[1:]
    normed = F.layer_norm(residual.index_select(0, index), dim, weight.to(dtype), bias.to(dtype))
    return (F.dropout(normed, dropout_p),)


if __name__ == "__main__":
    main(OPERATOR)
