"""What the benchmarks of `cosine_logits` and `cosine_cross_entropy` share: inputs, the other implementations, the least work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine import available_bytes
from ..sizes import Size
from ..torchaudio_peer import import_models, installed
from .case import CannotRun, Function, Inputs, Side, Work, randn, torchaudio_version

# The published second iteration first: what is measured first is measured even in a short run.
_CLASSES = {"cpu": (500, 100), "cuda": (500, 2000, 100, 10_000)}

# (frames, embeddings, labels) -> [frames, 1 + classes]
Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


def classes_on(device: str) -> tuple[int, ...]:
    return _CLASSES[torch.device(device).type]


def frames_and_embeddings(
    generator: torch.Generator, rows: int, classes: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames ``[rows, dim]`` in ``dtype`` and embeddings ``[classes, dim]`` in float32, which want gradients, and labels."""
    frames = randn(generator, rows, dim, dtype=dtype).requires_grad_()
    uniform = torch.rand(classes, dim, device=generator.device, generator=generator)  # as the model initialises them
    labels = torch.randint(classes, (rows,), device=generator.device, generator=generator)
    return frames, uniform.requires_grad_(), labels


def normalised_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    """As PyTorch computes them best: normalise, then one product, in float32."""
    return _normalised_logits(frames, label_embeddings, labels, torch.float32)


def normalised_narrow_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    """The same with the product in the frames' dtype, which is less precise than the other implementations."""
    return _normalised_logits(frames, label_embeddings, labels, frames.dtype)


def _normalised_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor, product: torch.dtype) -> Tensor:
    x, embeddings = (F.normalize(each.float(), eps=1e-8).to(product) for each in (frames, label_embeddings))
    scores = (x @ embeddings.T).float() / 0.1
    others = scores.scatter(1, labels[:, None], float("-inf"))
    return torch.cat([scores.gather(1, labels[:, None]), others], 1).to(frames.dtype)


def torchaudio_logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
    """torchaudio's own function."""
    import_models()
    from torchaudio.models.wav2vec2 import components

    return components._compute_logits(frames, labels, label_embeddings)


def torchaudio_side(size: Size, classes: int, function: Function) -> dict[str, Side]:
    """``function``, which calls `torchaudio_logits`, as a side; none where torchaudio is not installed."""
    if not installed():
        return {}
    return {"torchaudio": Side(function, torchaudio_version(), prepare=partial(_that_fit, size, classes))}


def _that_fit(size: Size, classes: int, inputs: Inputs) -> Inputs:
    """About ten of torchaudio's broadcasts of [classes + 1, kept, dim] in float32 live in the backward."""
    needed = 10 * 4 * (classes + 1) * size.kept * size.final_dim
    free = available_bytes(inputs.tensors[0].device)
    if free is not None and needed > free:
        raise CannotRun(f"its broadcasts need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    return inputs


def work(size: Size, classes: int, dtype: torch.dtype) -> Work:
    """Of the forward, logits not counted: frames and embeddings read once, and one product."""
    values, parameters = size.kept * size.final_dim * dtype.itemsize, 4 * classes * size.final_dim
    return Work(values + parameters, 2.0 * size.kept * classes * size.final_dim)


def backward_work(size: Size, classes: int, dtype: torch.dtype) -> Work:
    """Frames and embeddings read again, gradients written, and two products."""
    forward = work(size, classes, dtype)
    return forward + forward
