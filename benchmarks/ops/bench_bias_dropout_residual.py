"""``bias_dropout_residual``, in the shapes of a model's blocks.

python -m benchmarks.ops.bench_bias_dropout_residual
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual

from ..sizes import Size
from .case import OperatorCase, Tensors
from .command_line import main
from .rows import parameter, row_cases, rows

OPERATOR = "bias_dropout_residual"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    tensor_bytes = size.rows * size.dim * dtype.itemsize

    def draw(generator: torch.Generator) -> tuple[Tensors, Tensors]:
        x, residual, direction = (rows(generator, size.rows, size.dim, dtype) for _ in range(3))
        return (x, parameter(generator, size.dim), residual), (direction,)

    for dropout_p in (0.1, 0.0):
        yield from row_cases(
            OPERATOR, size, dtype, device, dropout_p,
            name=f"{size.rows} x {size.dim}",
            shape={"rows": size.rows, "channels": size.dim},
            draw=draw,
            functions=(_ours, _plain),
            least_bytes=(3 * tensor_bytes, 2 * tensor_bytes),  # the gradient of the residual is that of the result
        )  # fmt: skip


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, residual, seed = tensors
    return (bias_dropout_residual(x, bias, residual, dropout_p=dropout_p, seed=seed),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, residual, _ = tensors
    return (residual + F.dropout(x + bias.to(x.dtype), dropout_p),)


if __name__ == "__main__":
    main(OPERATOR)
