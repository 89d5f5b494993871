"""``residual_layer_norm``: post-norm and pre-norm blocks, and packing, in a model's shapes.

    python -m benchmarks.ops.bench_residual_layer_norm

The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from hubert_fast.ops.residual_layer_norm import residual_layer_norm

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Tensors, Work, both_ways, generator_on, ours, pytorch
from .rows import parameter, rows, seed_on, stream_dtype

OPERATOR = "residual_layer_norm"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for dropout_p in (0.1, 0.0):
        for with_sum in (False, True):
            yield from _block(size, dtype, device, dropout_p, with_sum=with_sum)
        yield from _packing(size, dtype, device, dropout_p)


def _block(size: Size, dtype: torch.dtype, device: str, dropout_p: float, *, with_sum: bool) -> Iterator[OperatorCase]:
    """Post-norm, or pre-norm ``with_sum``. The update is a product's, in ``dtype``; what comes out is as wide as the stream."""
    stream = stream_dtype(dtype, device, pre_norm=with_sum)
    stream_bytes, update_bytes = (size.rows * size.dim * each.itemsize for each in (stream, dtype))

    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        residual, update = (rows(generator, size.rows, size.dim, each) for each in (stream, dtype))
        vectors = [parameter(generator, size.dim) for _ in range(3)]
        directions = [rows(generator, size.rows, size.dim, stream).detach() for _ in range(1 + with_sum)]
        return Inputs((residual, update, *vectors, seed_on(device)), tuple(directions))

    functions = [partial(each, with_sum=with_sum) for each in (_our_block, _plain_block)]
    sides = {OURS: ours(OPERATOR, device, functions[0]), **pytorch("PyTorch", functions[1])}
    block = f"{'pre' if with_sum else 'post'}-norm" + ("" if stream == dtype else ", float32 stream")
    case = OperatorCase(
        name=f"{size.name}, {block}, {size.rows} x {size.dim}, dropout {dropout_p}",
        shape={
            "model": size.name, "rows": size.rows, "channels": size.dim, "pre_norm": with_sum, "dropout": dropout_p,
            "stream": str(stream).removeprefix("torch."),
        },
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["PyTorch"],
        least=Work((2 + with_sum) * stream_bytes + update_bytes),  # residual, normed, the sum where it is wanted; update
        dropout_p=dropout_p,
    )  # fmt: skip
    # The sum, where it is kept for this alone; gradient of normed, sum, gradient of the residual; gradient of the sum, and that
    # of the update where it is another.
    kept, another = 1 - with_sum, dropout_p > 0.0 or stream != dtype
    yield from both_ways(case, Work((kept + 3 + with_sum) * stream_bytes + another * update_bytes))


def _our_block(tensors: Tensors, dropout_p: float, *, with_sum: bool) -> Tensors:
    residual, update, weight, bias, update_bias, seed = tensors
    out = residual_layer_norm(
        residual, weight, bias, update=update, update_bias=update_bias, update_dropout_p=dropout_p, seed=seed,
        with_sum=with_sum,
    )  # fmt: skip
    return out if with_sum else (out,)


def _plain_block(tensors: Tensors, dropout_p: float, *, with_sum: bool) -> Tensors:
    residual, update, weight, bias, update_bias, _ = tensors
    dtype, dim = residual.dtype, residual.shape[1:]
    summed = residual + F.dropout(update + update_bias.to(update.dtype), dropout_p)
    normed = F.layer_norm(summed, dim, weight.to(dtype), bias.to(dtype))
    return (normed, summed) if with_sum else (normed,)


def _packing(size: Size, dtype: torch.dtype, device: str, dropout_p: float) -> Iterator[OperatorCase]:
    """The rows of the valid frames are taken out of the padded grid on the way into LayerNorm."""
    positions, row_bytes = size.batch * size.frames, size.dim * dtype.itemsize

    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        residual, direction = (rows(generator, count, size.dim, dtype) for count in (positions, size.rows))
        vectors = [parameter(generator, size.dim) for _ in range(2)]
        index = torch.randperm(positions, device=device, generator=generator)[: size.rows].sort().values
        return Inputs((residual, *vectors, index, seed_on(device)), (direction.detach(),))

    sides = {OURS: ours(OPERATOR, device, _our_packing), **pytorch("PyTorch", _plain_packing)}
    case = OperatorCase(
        name=f"{size.name}, packing, {size.rows} of {positions} x {size.dim}, dropout {dropout_p}",
        shape={
            "model": size.name, "rows": size.rows, "positions": positions, "channels": size.dim, "dropout": dropout_p,
        },
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["PyTorch"],
        least=Work(2 * size.rows * row_bytes),
        dropout_p=dropout_p,
    )  # fmt: skip
    yield from both_ways(case, Work((2 * size.rows + positions) * row_bytes))


def _our_packing(tensors: Tensors, dropout_p: float) -> Tensors:
    residual, weight, bias, index, seed = tensors
    return (residual_layer_norm(residual, weight, bias, index=index, output_dropout_p=dropout_p, seed=seed),)


def _plain_packing(tensors: Tensors, dropout_p: float) -> Tensors:
    residual, weight, bias, index, _ = tensors
    dtype, dim = residual.dtype, residual.shape[1:]
    normed = F.layer_norm(residual.index_select(0, index), dim, weight.to(dtype), bias.to(dtype))
    return (F.dropout(normed, dropout_p),)


def test_residual_layer_norm(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
