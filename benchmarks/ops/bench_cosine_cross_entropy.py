"""``cosine_cross_entropy`` beside torchaudio's logits + cross-entropy, and beside normalise + product.

    python -m benchmarks.ops.bench_cosine_cross_entropy

Loss of the masked frames of a batch. All sides are given all frames and the masked ones' index; ours also counts the correct
frames, the others do not. "16-bit products" normalises in float32 and multiplies in the frames' dtype, which is less precise than
the other sides. Where torchaudio's broadcasts would not fit into memory it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy

from ..sizes import Size
from . import cosine
from .case import OURS, Inputs, OperatorCase, Side, Tensors, both_ways, generator_on, ours, pytorch

OPERATOR = "cosine_cross_entropy"


def cases(size: Size, dtype: torch.dtype, device: str) -> Iterator[OperatorCase]:
    for classes in cosine.classes_on(device):
        yield from _cases(size, dtype, device, classes)


def _cases(size: Size, dtype: torch.dtype, device: str, classes: int) -> Iterator[OperatorCase]:
    def draw(seed: int) -> Inputs:
        generator = generator_on(device, seed)
        drawn = cosine.frames_and_embeddings(generator, size.rows, classes, size.final_dim, dtype)
        index = torch.randperm(size.rows, device=device, generator=generator)[: size.kept].sort().values
        return Inputs((*drawn, index), (torch.ones((), device=device),))

    sides = _sides(size, classes, dtype, device)
    case = OperatorCase(
        name=f"{size.name}, {size.kept} of {size.rows} frames x {classes} classes x {size.final_dim}",
        shape={
            "model": size.name, "frames": size.kept, "of_frames": size.rows, "classes": classes, "dim": size.final_dim,
        },
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["normalise + product"],
        least=cosine.work(size, classes, dtype),
    )  # fmt: skip
    yield from both_ways(case, cosine.backward_work(size, classes, dtype))


def _sides(size: Size, classes: int, dtype: torch.dtype, device: str) -> dict[str, Side]:
    sides = {OURS: ours(OPERATOR, device, _ours)}
    if torch.device(device).type == "cuda":
        sides[f"{OURS} torch"] = ours(OPERATOR, device, _ours, "torch")
    sides |= cosine.torchaudio_side(size, classes, _loss_of(cosine.torchaudio_logits))
    sides |= pytorch("normalise + product", _loss_of(cosine.normalised_logits))
    if dtype != torch.float32:
        sides |= pytorch("normalise + 16-bit product", _loss_of(cosine.normalised_narrow_logits))
    return sides


def _ours(tensors: Tensors, dropout_p: float) -> Tensors:
    return (cosine_cross_entropy(*tensors)[0],)


def _loss_of(logits: cosine.Logits) -> partial:
    return partial(_loss, logits=logits)


def _loss(tensors: Tensors, dropout_p: float, *, logits: cosine.Logits) -> Tensors:
    """Summed cross-entropy against column 0, as torchaudio's recipe computes it."""
    frames, label_embeddings, labels, index = tensors
    selected = logits(frames[index], label_embeddings, labels[index]).float()
    return (F.cross_entropy(selected, torch.zeros_like(index), reduction="sum"),)


def test_cosine_cross_entropy(timed) -> None:
    timed()


if __name__ == "__main__":
    from .command_line import main

    main(OPERATOR)
