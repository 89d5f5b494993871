"""``bias_gelu_dropout``, in the shapes of a model's feed-forward blocks.

python -m benchmarks.ops.bench_bias_gelu_dropout
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout

from ..sizes import Size
from .case import OperatorCase, Tensors
from .command_line import main
from .rows import parameter, row_cases, rows

OPERATOR = "bias_gelu_dropout"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    tensor_bytes = size.rows * size.ffn * dtype.itemsize

    def draw(generator: torch.Generator) -> tuple[Tensors, Tensors]:
        x, direction = (rows(generator, size.rows, size.ffn, dtype) for _ in range(2))
        return (x, parameter(generator, size.ffn)), (direction,)

    for dropout_p in (0.0, 0.1):  # HuBERT Base has none here
        yield from row_cases(
            OPERATOR, size, dtype, device, dropout_p,
            name=f"{size.rows} x {size.ffn}",
            shape={"rows": size.rows, "channels": size.ffn},
            draw=draw,
            functions=(_ours, _plain),
            least_bytes=(2 * tensor_bytes, 3 * tensor_bytes),
        )  # fmt: skip


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, seed = tensors
    return (bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, _ = tensors
    return (F.dropout(F.gelu(x + bias.to(x.dtype)), dropout_p),)


if __name__ == "__main__":
    main(OPERATOR)
