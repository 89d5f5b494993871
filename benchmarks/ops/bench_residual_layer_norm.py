"""``residual_layer_norm`` on a GPU: post-norm and pre-norm blocks, and packing, in a model's shapes.

    python -m benchmarks.ops.bench_residual_layer_norm --json benchmarks/results/residual-layer-norm-base-h100.json

Needs an NVIDIA GPU. The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.row_passes import Case, main, rows, vector
from hubert_fast.ops.residual_layer_norm import residual_layer_norm
from tools.aot.sizes import Size


def cases(size: Size, dtype: torch.dtype) -> list[Case]:
    blocks = [
        _block(size, dtype, dropout_p, with_sum=with_sum) for dropout_p in (0.1, 0.0) for with_sum in (False, True)
    ]
    return [*blocks, _packing(size, dtype, 0.1), _packing(size, dtype, 0.0)]


def _block(size: Size, dtype: torch.dtype, dropout_p: float, *, with_sum: bool) -> Case:
    """Post-norm, or pre-norm ``with_sum``."""
    seed = torch.tensor(0, device="cuda")
    tensor_bytes = size.rows * size.dim * dtype.itemsize

    def operator(*inputs: Tensor) -> tuple[Tensor, ...]:
        residual, weight, bias, update, update_bias = inputs
        out = residual_layer_norm(
            residual, weight, bias, update=update, update_bias=update_bias, update_dropout_p=dropout_p, seed=seed,
            with_sum=with_sum,
        )  # fmt: skip
        return out if with_sum else (out,)

    def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
        residual, weight, bias, update, update_bias = inputs
        summed = residual + F.dropout(update + update_bias.to(dtype), dropout_p)
        normed = F.layer_norm(summed, (size.dim,), weight.to(dtype), bias.to(dtype))
        return (normed, summed) if with_sum else (normed,)

    return Case(
        name=f"{'pre' if with_sum else 'post'}-norm, {size.rows} x {size.dim}, dropout {dropout_p}",
        draw=lambda: (
            rows(size.rows, size.dim, dtype),
            vector(size.dim),
            vector(size.dim),
            rows(size.rows, size.dim, dtype),
            vector(size.dim),
        ),  # fmt: skip
        operator=operator,
        plain=plain,
        forward_bytes=4 * tensor_bytes,  # residual, update, normed, sum
        # Gradient of normed, sum, gradient of the residual; that of the sum, and that of the update where it is another.
        backward_bytes=(3 + with_sum + (dropout_p > 0.0)) * tensor_bytes,
        random=dropout_p > 0.0,
    )


def _packing(size: Size, dtype: torch.dtype, dropout_p: float) -> Case:
    seed = torch.tensor(0, device="cuda")
    positions, row_bytes = size.batch * size.frames, size.dim * dtype.itemsize
    index = torch.randperm(positions, device="cuda")[: size.rows].sort().values

    def operator(residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (residual_layer_norm(residual, weight, bias, index=index, output_dropout_p=dropout_p, seed=seed),)

    def plain(residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        normed = F.layer_norm(residual.index_select(0, index), (size.dim,), weight.to(dtype), bias.to(dtype))
        return (F.dropout(normed, dropout_p),)

    return Case(
        name=f"packing, {size.rows} of {positions} x {size.dim}, dropout {dropout_p}",
        draw=lambda: (rows(positions, size.dim, dtype), vector(size.dim), vector(size.dim)),
        operator=operator,
        plain=plain,
        forward_bytes=2 * size.rows * row_bytes,
        backward_bytes=(2 * size.rows + positions) * row_bytes,
        random=dropout_p > 0.0,
    )


if __name__ == "__main__":
    main("residual_layer_norm", __doc__.splitlines()[0], cases)
