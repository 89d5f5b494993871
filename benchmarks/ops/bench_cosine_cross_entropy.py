"""``cosine_cross_entropy`` beside torchaudio's logits + cross-entropy, and beside normalise + product.

    python -m benchmarks.ops.bench_cosine_cross_entropy

Loss of the masked frames of a batch, and how many are right; where another side is compiled, the compiler leaves the latter out.
All sides are given all frames and the masked ones' index. "16-bit products" normalises in float32 and multiplies in the frames'
dtype, which is less precise than the other sides. torchaudio takes no part where its broadcasts would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy

from ..sizes import Size
from . import cosine
from .case import Inputs, OperatorCase, Tensors, generator_on
from .command_line import main
from .rows import some_of

OPERATOR = "cosine_cross_entropy"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for classes in cosine.classes_on(device):
        yield from cosine.cosine_cases(
            OPERATOR, size, dtype, device, classes,
            frames=f"{size.kept} of {size.rows}",
            shape={"frames": size.kept, "of_frames": size.rows},
            draw=partial(_draw, size, dtype, device, classes),
            call=lambda tensors, dropout_p: (cosine_cross_entropy(*tensors)[0],),
            others=lambda logits: partial(_loss, logits=logits),
        )  # fmt: skip


def _draw(size: Size, dtype: torch.dtype, device: str, classes: int, seed: int) -> Inputs:
    generator = generator_on(device, seed)
    drawn = cosine.frames_and_embeddings(generator, size.rows, classes, size.final_dim, dtype)
    return Inputs((*drawn, some_of(generator, size.rows, size.kept)), (torch.ones((), device=device),))


def _loss(tensors: Tensors, dropout_p: float, *, logits: cosine.Logits) -> Tensors:
    """The summed cross-entropy against column 0; correct frames are counted too, as a recipe does for its log."""
    frames, label_embeddings, labels, index = tensors
    selected = logits(frames[index], label_embeddings, labels[index]).float()
    (selected[:, 0] >= selected[:, 1:].amax(1)).sum()
    return (F.cross_entropy(selected, torch.zeros_like(index), reduction="sum"),)


if __name__ == "__main__":
    main(OPERATOR)
