"""``bias_gelu_dropout`` on a GPU, in the shapes of a model's feed-forward blocks.

    python -m benchmarks.ops.bench_bias_gelu_dropout --json benchmarks/results/bias-gelu-dropout-base-h100.json

Needs an NVIDIA GPU. The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.row_passes import Case, main, rows, vector
from hubert_fast.ops.bias_gelu_dropout import bias_gelu_dropout
from tools.aot.sizes import Size


def cases(size: Size, dtype: torch.dtype) -> list[Case]:
    return [_case(size, dtype, dropout_p) for dropout_p in (0.1, 0.0)]


def _case(size: Size, dtype: torch.dtype, dropout_p: float) -> Case:
    seed = torch.tensor(0, device="cuda")
    tensor_bytes = size.rows * size.ffn * dtype.itemsize

    def operator(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed),)

    def plain(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (F.dropout(F.gelu(x + bias.to(x.dtype)), dropout_p),)

    return Case(
        name=f"{size.rows} x {size.ffn}, dropout {dropout_p}",
        draw=lambda: (rows(size.rows, size.ffn, dtype), vector(size.ffn)),
        operator=operator,
        plain=plain,
        forward_bytes=2 * tensor_bytes,
        backward_bytes=3 * tensor_bytes,
        random=dropout_p > 0.0,
    )


if __name__ == "__main__":
    main("bias_gelu_dropout", __doc__.splitlines()[0], cases)
