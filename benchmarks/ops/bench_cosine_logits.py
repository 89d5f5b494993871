"""``cosine_logits`` on a GPU beside torchaudio's logits and torch.compile of normalise + product.

    python -m benchmarks.ops.bench_cosine_logits
    python -m benchmarks.ops.bench_cosine_logits --size base --json benchmarks/results/cosine-logits-base-h100.json

Logits of the masked frames of a batch, already gathered, forward and with the gradients of frames and embeddings. "16-bit
products" normalises in float32 and multiplies in the frames' dtype. Where torchaudio's broadcasts would not fit into memory it is
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.ops import cosine_cases
from benchmarks.ops.cosine_cases import DTYPES, Inputs, Side, normalised_logits
from hubert_fast import backend
from hubert_fast.ops.cosine_logits import cosine_logits
from tools.aot.sizes import SIZES, Size

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    arguments = cosine_cases.parse(__doc__.splitlines()[0])
    size, dtype = SIZES[arguments.size], DTYPES[arguments.dtype]
    limit = gpu_timing.limits(dtype)
    cases = []
    for classes in arguments.classes:
        cases += _cases(f"{arguments.size}, {arguments.dtype}", size, classes, dtype, limit, arguments.repeats)
    gpu_timing.write(arguments.json, "cosine_logits", cases, limit)


def _cases(
    name: str, size: Size, classes: int, dtype: torch.dtype, limit: gpu_timing.Limits, repeats: int
) -> list[dict[str, Any]]:
    """Forward, and forward with backward."""
    functions, truth = _functions(size, classes, dtype), normalised_logits(torch.float32)
    description = f"{name}, {size.kept} frames x {classes} classes x {size.final_dim}"
    cases = []
    for what, timed, backward in (("forward", _forward, False), ("forward and backward", _both, True)):
        least = cosine_cases.work(size, classes, dtype, backward=backward, logits=True)
        sets = [_gathered(size, classes, dtype) for _ in range(gpu_timing.copies(least.bytes))]
        direction = torch.randn(size.kept, 1 + classes, device="cuda")
        sides = {each: timed(function, direction) for each, function in functions.items()}
        case = cosine_cases.case(f"{what}: {description}", sides, timed(truth, direction), sets, least, limit, repeats)
        cases.append(case)
    return cases


def _gathered(size: Size, classes: int, dtype: torch.dtype) -> Inputs:
    inputs = cosine_cases.draw(size, classes, dtype)
    frames = inputs.frames.detach()[inputs.index].requires_grad_()
    return inputs._replace(frames=frames, labels=inputs.labels[inputs.index])


def _functions(size: Size, classes: int, dtype: torch.dtype) -> dict[str, Logits]:
    def ours(name: str) -> Logits:
        def logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
            with backend.using(name, "cosine_logits"):
                return cosine_logits(frames, label_embeddings, labels)

        return logits

    torch.compiler.reset()  # or it would compile for any number of classes after the first
    functions = {"triton": ours("triton"), "torch": ours("torch")}
    theirs = cosine_cases.torchaudio_logits()
    if theirs is not None and cosine_cases.torchaudio_fits(size, classes):
        functions["torchaudio"] = theirs
    float32 = normalised_logits(torch.float32)
    functions["normalise + product"] = float32
    functions["normalise + product, compiled"] = torch.compile(float32)
    if dtype != torch.float32:
        functions["normalise + product, compiled, 16-bit products"] = torch.compile(normalised_logits(dtype))
    return functions


def _forward(function: Logits, direction: Tensor) -> Side:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(inputs.frames, inputs.label_embeddings, inputs.labels),)

    return call


def _both(function: Logits, direction: Tensor) -> Side:
    """``direction`` is the gradient of the logits; it is brought to their dtype first."""
    narrow: dict[torch.dtype, Tensor] = {}

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        logits = function(inputs.frames, inputs.label_embeddings, inputs.labels)
        gradient = narrow.setdefault(logits.dtype, direction.to(logits.dtype))
        return logits, *torch.autograd.grad(logits, [inputs.frames, inputs.label_embeddings], gradient)

    return call


if __name__ == "__main__":
    main()
