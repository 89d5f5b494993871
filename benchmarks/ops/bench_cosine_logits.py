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
from .case import (
    OURS,
    Inputs,
    OperatorCase,
    Side,
    Tensors,
    Work,
    both_ways,
    generator_on,
    ours,
    pytorch,
    randn,
)

OPERATOR = "cosine_logits"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for classes in cosine.classes_on(device):
        yield from _cases(size, dtype, device, classes)


def _cases(size: Size, dtype: torch.dtype, device: str, classes: int) -> Iterator[OperatorCase]:
    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        drawn = cosine.frames_and_embeddings(generator, size.kept, classes, size.final_dim, dtype)
        return Inputs(drawn, (randn(generator, size.kept, 1 + classes, dtype=dtype),))

    written = Work(size.kept * (1 + classes) * dtype.itemsize)  # read in the backward
    sides = _sides(size, classes, dtype, device)
    case = OperatorCase(
        name=f"{size.name}, {size.kept} frames x {classes} classes x {size.final_dim}",
        shape={"model": size.name, "frames": size.kept, "classes": classes, "dim": size.final_dim},
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["normalise + product"],
        least=cosine.work(size, classes, dtype) + written,
    )
    yield from both_ways(case, cosine.backward_work(size, classes, dtype) + written)


def _sides(size: Size, classes: int, dtype: torch.dtype, device: str) -> dict[str, Side]:
    sides = {OURS: ours(OPERATOR, device, _ours)}
    if torch.device(device).type == "cuda":
        sides[f"{OURS} torch"] = ours(OPERATOR, device, _ours, "torch")
    sides |= cosine.torchaudio_side(size, classes, _plain(cosine.torchaudio_logits))
    sides |= pytorch("normalise + product", _plain(cosine.normalised_logits))
    if dtype != torch.float32:
        sides |= pytorch("normalise + 16-bit product", _plain(cosine.normalised_narrow_logits))
    return sides


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    return (cosine_logits(*tensors),)


def _plain(logits: cosine.Logits) -> partial:
    return partial(_logits, logits=logits)


def _logits(tensors: Tensors, dropout_p: float, *, logits: cosine.Logits) -> Tensors:
    return (logits(*tensors),)


def test_cosine_logits(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
