"""``bias_dropout_residual`` on a GPU, in the shapes of a model's blocks.

    python -m benchmarks.ops.bench_bias_dropout_residual --json benchmarks/results/bias-dropout-residual-base-h100.json

Needs an NVIDIA GPU. The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.row_passes import Case, main, rows, vector
from hubert_fast.ops.bias_dropout_residual import bias_dropout_residual
from tools.aot.sizes import Size


def cases(size: Size, dtype: torch.dtype) -> list[Case]:
    return [_case(size, dtype, dropout_p) for dropout_p in (0.1, 0.0)]


def _case(size: Size, dtype: torch.dtype, dropout_p: float) -> Case:
    seed = torch.tensor(0, device="cuda")
    tensor_bytes = size.rows * size.dim * dtype.itemsize

    def operator(x: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (bias_dropout_residual(x, bias, residual, dropout_p=dropout_p, seed=seed),)

    def plain(x: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (residual + F.dropout(x + bias.to(x.dtype), dropout_p),)

    return Case(
        name=f"{size.rows} x {size.dim}, dropout {dropout_p}",
        draw=lambda: (rows(size.rows, size.dim, dtype), vector(size.dim), rows(size.rows, size.dim, dtype)),
        operator=operator,
        plain=plain,
        forward_bytes=3 * tensor_bytes,
        backward_bytes=2 * tensor_bytes,  # the gradient of the residual is that of the result
        random=dropout_p > 0.0,
    )


if __name__ == "__main__":
    main("bias_dropout_residual", __doc__.splitlines()[0], cases)
