"""``cosine_logits`` beside torchaudio's logits, and beside normalise + product.

    python -m benchmarks.ops.bench_cosine_logits

Logits of the masked frames of a batch, already gathered. "16-bit product" normalises in float32 and multiplies in the frames'
dtype. Where torchaudio's broadcasts would not fit into memory it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from hubert_fast.ops.cosine_logits import cosine_logits

from ..sizes import Size
from . import cosine
from .case import Inputs, OperatorCase, Tensors, generator_on, randn
from .command_line import main

OPERATOR = "cosine_logits"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for classes in cosine.classes_on(device):
        yield from cosine.cosine_cases(
            OPERATOR, size, dtype, device, classes,
            frames=str(size.kept),
            shape={"frames": size.kept},
            draw=partial(_draw, size, dtype, device, classes),
            call=partial(_logits, logits=cosine_logits),
            others=lambda logits: partial(_logits, logits=logits),
            moved=size.kept * (1 + classes) * dtype.itemsize,
        )  # fmt: skip


def _draw(size: Size, dtype: torch.dtype, device: str, classes: int, seed: int) -> Inputs:
    generator = generator_on(device, seed)
    drawn = cosine.frames_and_embeddings(generator, size.kept, classes, size.final_dim, dtype)
    return Inputs(drawn, (randn(generator, size.kept, 1 + classes, dtype=dtype),))


def _logits(tensors: Tensors, dropout_p: float, *, logits: cosine.Logits) -> Tensors:
    return (logits(*tensors),)


if __name__ == "__main__":
    main(OPERATOR)
