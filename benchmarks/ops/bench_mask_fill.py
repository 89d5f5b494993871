"""``mask_fill``, in the shapes of a model's input: half of the frames masked, the padding of a batch.

    python -m benchmarks.ops.bench_mask_fill

The seed is given, as a model gives it, so that drawing one is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_fast.ops.mask_fill import mask_fill

from ..sizes import Size
from .case import OURS, Inputs, OperatorCase, Tensors, Work, both_ways, generator_on, ours, pytorch
from .rows import parameter, rows, seed_on

OPERATOR = "mask_fill"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for dropout_p in (0.1, 0.0):
        yield from _cases(size, dtype, device, dropout_p)


def _cases(size: Size, dtype: torch.dtype, device: str, dropout_p: float) -> Iterator[OperatorCase]:
    count, row_bytes = size.batch * size.frames, size.dim * dtype.itemsize

    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        x, direction = (rows(generator, count, size.dim, dtype) for _ in range(2))
        bias, embedding = (parameter(generator, size.dim) for _ in range(2))
        return Inputs((x, bias, embedding, *_flags(size, generator), seed_on(device)), (direction.detach(),))

    padding = count - size.rows
    sides = {OURS: ours(OPERATOR, device, _ours), **pytorch("PyTorch", _plain)}
    case = OperatorCase(
        name=f"{size.name}, {count} x {size.dim}, {size.kept} masked, {padding} of padding, dropout {dropout_p}",
        shape={
            "model": size.name, "rows": count, "channels": size.dim, "masked": size.kept, "padding": padding,
            "dropout": dropout_p,
        },
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["PyTorch"],
        least=Work((count + size.rows - size.kept) * row_bytes),  # what is replaced need not be read
        dropout_p=dropout_p,
    )  # fmt: skip
    yield from both_ways(case, Work((count + size.rows) * row_bytes))  # nor what comes back into padding


def _flags(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masked frames and padding: the last rows are padding, and of the others as many as the model masks are masked."""
    row = torch.arange(size.batch * size.frames, device=generator.device)
    masked = torch.randperm(size.rows, device=generator.device, generator=generator)[: size.kept]
    mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, masked, True)
    return mask, row >= size.rows


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, embedding, mask, padding, seed = tensors
    return (mask_fill(x, bias, embedding, mask, padding=padding, dropout_p=dropout_p, seed=seed),)


def _plain(tensors: Tensors, dropout_p: float) -> Tensors:
    x, bias, embedding, mask, padding, _ = tensors
    filled = F.dropout(x + bias.to(x.dtype), dropout_p).masked_fill(padding[:, None], 0.0)
    return (torch.where(mask[:, None], embedding.to(x.dtype), filled),)


def test_mask_fill(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
