"""``feed_forward`` beside PyTorch's operations; weights are in the dtype of the rows, as a graphed step keeps copies of them.

python -m benchmarks.ops.bench_feed_forward
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from hubert_fast.ops.feed_forward import feed_forward

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Tensors, Work, both_ways, generator_on, ours, pytorch, randn
from .command_line import main
from .rows import rows

OPERATOR = "feed_forward"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    values, weights = size.rows * size.dim * dtype.itemsize, 2 * size.ffn * size.dim * dtype.itemsize
    flops = 4.0 * size.rows * size.dim * size.ffn
    backend = "cuda" if torch.device(device).type == "cuda" and dtype.itemsize == 2 else "torch"
    sides = {OURS: ours(OPERATOR, device, _ours, backend), **pytorch("PyTorch", _plain)}
    case = OperatorCase(
        name=f"{size.name}, {size.rows} x {size.dim} by {size.ffn}",
        shape={"model": size.name, "rows": size.rows, "channels": size.dim, "hidden": size.ffn},
        device=device,
        dtype=dtype,
        draw=partial(_draw, size, dtype, device),
        sides=sides,
        truth=sides["PyTorch"],
        least=Work(2 * values + weights, flops),
    )
    # Rows and the gradient of the output, gradient of the rows; weights and their gradients.
    return both_ways(case, Work(3 * values + 2 * weights, 2 * flops))


def _draw(size: Size, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Rows, first weight and bias, second weight."""
    generator = generator_on(device, seed)
    x, direction = (rows(generator, size.rows, size.dim, dtype) for _ in range(2))
    weight1 = randn(generator, size.ffn, size.dim) / size.dim**0.5
    weight2 = randn(generator, size.dim, size.ffn) / size.ffn**0.5
    parameters = (each.to(dtype).requires_grad_() for each in (weight1, randn(generator, size.ffn), weight2))
    return Inputs((x, *parameters), (direction.detach(),))


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    return (feed_forward(*tensors, dropout_p=dropout_p),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, weight1, bias1, weight2 = tensors
    return (F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2),)


if __name__ == "__main__":
    main(OPERATOR)
