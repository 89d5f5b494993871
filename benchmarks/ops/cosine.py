"""What the benchmarks of `cosine_logits` and `cosine_cross_entropy` share: inputs, the other implementations, the least work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine import available_bytes, version
from ..sizes import Size
from ..torchaudio_peer import import_components, installed
from .case import OURS, Function, Inputs, OperatorCase, Side, Work, both_ways, ours, pytorch, randn

# The published second iteration first: what is measured first is measured even in a short run.
_CLASSES = {"cpu": (500, 100), "cuda": (500, 2000, 100, 10_000)}

# (frames, embeddings, labels) -> [frames, 1 + classes]
Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


def classes_on(device: str) -> tuple[int, ...]:
    return _CLASSES[torch.device(device).type]


def cosine_cases(
    operator: str,
    size: Size,
    dtype: torch.dtype,
    device: str,
    classes: int,
    *,
    frames: str,
    shape: dict[str, Any],
    draw: Callable[[int], Inputs],
    call: Function,
    others: Callable[[Logits], Function],
    moved: float = 0.0,
) -> Iterator[OperatorCase]:
    """The operator of the masked frames with its backward, and by itself.

    Args:
        frames: which ones, for the name.
        call: ours.
        others: the same from the logits of another implementation.
        moved: bytes of the result, written in the forward and read in the backward.
    """
    sides = {OURS: ours(operator, device, call)}
    if torch.device(device).type == "cuda":
        sides[f"{OURS} torch"] = ours(operator, device, call, "torch")
    if installed():
        that_fit = partial(_that_fit, size, classes)
        sides["torchaudio"] = Side(others(_torchaudio_logits), version("torchaudio"), prepare=that_fit)
    sides |= pytorch("normalise + product", others(_normalised_logits))
    if dtype != torch.float32:
        sides |= pytorch("normalise + 16-bit product", others(_normalised_narrow_logits))
    # Frames and embeddings read once, and one product; in the backward read again, gradients written, and two products.
    values, parameters = size.kept * size.final_dim * dtype.itemsize, 4 * classes * size.final_dim
    work, result = Work(values + parameters, 2.0 * size.kept * classes * size.final_dim), Work(moved)
    case = OperatorCase(
        name=f"{size.name}, {frames} frames x {classes} classes x {size.final_dim}",
        shape={"model": size.name, **shape, "classes": classes, "dim": size.final_dim},
        device=device,
        dtype=dtype,
        draw=draw,
        sides=sides,
        truth=sides["normalise + product"],
        least=work + result,
    )
    return both_ways(case, work + work + result)


def frames_and_embeddings(
    generator: torch.Generator, rows: int, classes: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames ``[rows, dim]`` in ``dtype`` and embeddings ``[classes, dim]`` in float32, which want gradients, and labels."""
    frames = randn(generator, rows, dim, dtype=dtype).requires_grad_()
    uniform = torch.rand(classes, dim, device=generator.device, generator=generator)  # as the model initialises them
    labels = torch.randint(classes, (rows,), device=generator.device, generator=generator)
    return frames, uniform.requires_grad_(), labels


def _normalised_logits(
    frames: Tensor, label_embeddings: Tensor, labels: Tensor, product: torch.dtype = torch.float32
) -> Tensor:
    """Logits as PyTorch computes them best: normalise in float32, then one product."""
    x, embeddings = (F.normalize(each.float(), eps=1e-8).to(product) for each in (frames, label_embeddings))
    scores = (x @ embeddings.T).float() / 0.1
    others = scores.scatter(1, labels[:, None], float("-inf"))
    return torch.cat([scores.gather(1, labels[:, None]), others], 1).to(frames.dtype)


def _normalised_narrow_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    """The same with the product in the frames' dtype, which is less precise than the other implementations."""
    return _normalised_logits(frames, label_embeddings, labels, frames.dtype)


def _torchaudio_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    """torchaudio's own function."""
    return import_components()._compute_logits(frames, labels, label_embeddings)


def _that_fit(size: Size, classes: int, inputs: Inputs) -> Inputs:
    """About ten of torchaudio's broadcasts of [classes + 1, kept, dim] in float32 live in the backward."""
    needed = 10 * 4 * (classes + 1) * size.kept * size.final_dim
    free = available_bytes(inputs.tensors[0].device)
    if free is not None and needed > free:
        raise MemoryError(f"its broadcasts need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    return inputs
