"""``mask_fill`` on a GPU, in the shapes of a model's input: half of the frames masked, the padding of a batch.

    python -m benchmarks.ops.bench_mask_fill --json benchmarks/results/mask-fill-base-h100.json

Needs an NVIDIA GPU. The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.row_passes import Case, main, rows, vector
from hubert_fast.ops.mask_fill import mask_fill
from tools.aot.sizes import Size


def cases(size: Size, dtype: torch.dtype) -> list[Case]:
    return [_case(size, dtype, dropout_p) for dropout_p in (0.1, 0.0)]


def _case(size: Size, dtype: torch.dtype, dropout_p: float) -> Case:
    seed = torch.tensor(0, device="cuda")
    count = size.batch * size.frames
    row_bytes = size.dim * dtype.itemsize
    mask, padding = _flags(size)

    def operator(x: Tensor, bias: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        return (mask_fill(x, bias, embedding, mask, padding=padding, dropout_p=dropout_p, seed=seed),)

    def plain(x: Tensor, bias: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
        filled = F.dropout(x + bias.to(x.dtype), dropout_p).masked_fill(padding[:, None], 0.0)
        return (torch.where(mask[:, None], embedding.to(x.dtype), filled),)

    return Case(
        name=f"{count} x {size.dim}, {size.kept} masked, {count - size.rows} of padding, dropout {dropout_p}",
        draw=lambda: (rows(count, size.dim, dtype), vector(size.dim), vector(size.dim)),
        operator=operator,
        plain=plain,
        forward_bytes=(count + size.rows - size.kept) * row_bytes,  # what is replaced need not be read
        backward_bytes=(count + size.rows) * row_bytes,  # nor what comes back into padding
        random=dropout_p > 0.0,
    )


def _flags(size: Size) -> tuple[Tensor, Tensor]:
    """Masked frames and padding: the last rows are padding, and of the others as many as the model masks are masked."""
    row = torch.arange(size.batch * size.frames, device="cuda")
    masked = torch.randperm(size.rows, device="cuda")[: size.kept]
    mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, masked, True)
    return mask, row >= size.rows


if __name__ == "__main__":
    main("mask_fill", __doc__.splitlines()[0], cases)
