"""``cosine_cross_entropy`` on a GPU beside torchaudio's logits + cross-entropy and torch.compile of normalise + product.

    python -m benchmarks.ops.bench_cosine_cross_entropy
    python -m benchmarks.ops.bench_cosine_cross_entropy --size base --json benchmarks/results/cosine-cross-entropy-base-h100.json

Loss of the masked frames of a batch, forward and with the gradients of frames and embeddings. All sides are given all frames and
the masked ones' index; ours also counts the correct frames, the others do not. "16-bit products" normalises in float32 and
multiplies in the frames' dtype, which is less precise than the other sides. Where torchaudio's broadcasts would not fit into
memory it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.ops import cosine_cases
from benchmarks.ops.cosine_cases import DTYPES, Inputs, Side, normalised_logits
from hubert_fast import backend
from hubert_fast.ops.cosine_cross_entropy import cosine_cross_entropy
from tools.aot.sizes import SIZES, Size

Loss = Callable[[Inputs], Tensor]


def main() -> None:
    arguments = cosine_cases.parse(__doc__.splitlines()[0])
    size, dtype = SIZES[arguments.size], DTYPES[arguments.dtype]
    limit = gpu_timing.limits(dtype)
    cases = []
    for classes in arguments.classes:
        cases += _cases(f"{arguments.size}, {arguments.dtype}", size, classes, dtype, limit, arguments.repeats)
    gpu_timing.write(arguments.json, "cosine_cross_entropy", cases, limit)


def _cases(
    name: str, size: Size, classes: int, dtype: torch.dtype, limit: gpu_timing.Limits, repeats: int
) -> list[dict[str, Any]]:
    """Forward, and forward with backward."""
    losses = _losses(size, classes, dtype)
    truth = _of_logits(normalised_logits(torch.float32))
    description = f"{name}, {size.kept} of {size.rows} frames x {classes} classes x {size.final_dim}"
    cases = []
    for what, timed, backward in (("forward", _forward, False), ("forward and backward", _both, True)):
        least = cosine_cases.work(size, classes, dtype, backward=backward, logits=False)
        sets = [cosine_cases.draw(size, classes, dtype) for _ in range(gpu_timing.copies(least.bytes))]
        sides = {each: timed(loss) for each, loss in losses.items()}
        cases.append(cosine_cases.case(f"{what}: {description}", sides, timed(truth), sets, least, limit, repeats))
    return cases


def _losses(size: Size, classes: int, dtype: torch.dtype) -> dict[str, Loss]:
    def ours(name: str) -> Loss:
        def loss(inputs: Inputs) -> Tensor:
            with backend.using(name, "cosine_cross_entropy"):
                return cosine_cross_entropy(inputs.frames, inputs.label_embeddings, inputs.labels, inputs.index)[0]

        return loss

    torch.compiler.reset()  # or it would compile for any number of classes after the first
    losses = {"triton": ours("triton"), "torch": ours("torch")}
    theirs = cosine_cases.torchaudio_logits()
    if theirs is not None and cosine_cases.torchaudio_fits(size, classes):
        losses["torchaudio"] = _of_logits(theirs)
    float32 = _of_logits(normalised_logits(torch.float32))
    losses["normalise + product"] = float32
    losses["normalise + product, compiled"] = torch.compile(float32)
    if dtype != torch.float32:
        losses["normalise + product, compiled, 16-bit products"] = torch.compile(_of_logits(normalised_logits(dtype)))
    return losses


def _of_logits(logits: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Summed cross-entropy against column 0, as torchaudio's recipe computes it."""

    def loss(inputs: Inputs) -> Tensor:
        selected = logits(inputs.frames[inputs.index], inputs.label_embeddings, inputs.labels[inputs.index]).float()
        return F.cross_entropy(selected, torch.zeros_like(inputs.index), reduction="sum")

    return loss


def _forward(loss: Loss) -> Side:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(inputs),)

    return call


def _both(loss: Loss) -> Side:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        result = loss(inputs)
        return result, *torch.autograd.grad(result, [inputs.frames, inputs.label_embeddings])

    return call


if __name__ == "__main__":
    main()
