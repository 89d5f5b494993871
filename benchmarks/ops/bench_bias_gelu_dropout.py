"""``bias_gelu_dropout``, in the shapes of a model's feed-forward blocks.

    python -m benchmarks.ops.bench_bias_gelu_dropout

The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Tensors, Work, both_ways, generator_on, ours, pytorch
from .rows import parameter, rows, seed_on

OPERATOR = "bias_gelu_dropout"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for dropout_p in (0.0, 0.1):  # HuBERT Base has none here
        yield from _cases(size, dtype, device, dropout_p)


def _cases(size: Size, dtype: torch.dtype, device: str, dropout_p: float) -> Iterator[OperatorCase]:
    tensor_bytes = size.rows * size.ffn * dtype.itemsize

    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        x, direction = (rows(generator, size.rows, size.ffn, dtype) for _ in range(2))
        return Inputs((x, parameter(generator, size.ffn), seed_on(device)), (direction.detach(),))

    sides = {OURS: ours(OPERATOR, device, _ours), **pytorch("PyTorch", _plain)}
    case = OperatorCase(
        name=f"{size.name}, {size.rows} x {size.ffn}, dropout {dropout_p}",
        shape={"model": size.name, "rows": size.rows, "channels": size.ffn, "dropout": dropout_p},
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["PyTorch"],
        least=Work(2 * tensor_bytes),
        dropout_p=dropout_p,
    )
    yield from both_ways(case, Work(3 * tensor_bytes))


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, seed = tensors
    return (bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, _ = tensors
    return (F.dropout(F.gelu(x + bias.to(x.dtype)), dropout_p),)


def test_bias_gelu_dropout(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
