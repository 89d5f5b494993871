"""``mask_fill``, in the shapes of a model's input: half of the frames masked, the padding of a batch.

python -m benchmarks.ops.bench_mask_fill
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from hubert_fast.ops.mask_fill import mask_fill

from ..sizes import Size
from .case import OperatorCase, Tensors
from .command_line import main
from .rows import parameter, row_cases, rows, some_of

OPERATOR = "mask_fill"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    count, row_bytes = size.batch * size.frames, size.dim * dtype.itemsize
    padding = count - size.rows

    def draw(generator: torch.Generator) -> tuple[Tensors, Tensors]:
        x, direction = (rows(generator, count, size.dim, dtype) for _ in range(2))
        bias, embedding = (parameter(generator, size.dim) for _ in range(2))
        # The last rows are padding, and of the others as many as the model masks are masked.
        row = torch.arange(count, device=device)
        mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, some_of(generator, size.rows, size.kept), True)
        return (x, bias, embedding, mask, row >= size.rows), (direction,)

    for dropout_p in (0.1, 0.0):
        yield from row_cases(
            OPERATOR, size, dtype, device, dropout_p,
            name=f"{count} x {size.dim}, {size.kept} masked, {padding} of padding",
            shape={"rows": count, "channels": size.dim, "masked": size.kept, "padding": padding},
            draw=draw,
            functions=(_ours, _plain),
            # What is replaced need not be read, nor what comes back into padding.
            least_bytes=((count + size.rows - size.kept) * row_bytes, (count + size.rows) * row_bytes),
        )  # fmt: skip


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, embedding, mask, padding, seed = tensors
    return (mask_fill(x, bias, embedding, mask, padding=padding, dropout_p=dropout_p, seed=seed),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, embedding, mask, padding, _ = tensors
    filled = F.dropout(x + bias.to(x.dtype), dropout_p).masked_fill(padding[:, None], 0.0)
    return (torch.where(mask[:, None], embedding.to(x.dtype), filled),)


if __name__ == "__main__":
    main(OPERATOR)
