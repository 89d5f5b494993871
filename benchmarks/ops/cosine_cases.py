"""What the benchmarks of `cosine_logits` and `cosine_cross_entropy` share: inputs, the other implementations, the turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.gpu_timing import Limits, Work
from tools.aot.sizes import SIZES, Size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Errors of the results and gradients, relative to float32's, up to which a side does the same work: that of products in 16 bits.
_TOLERANCE = 0.03


class Inputs(NamedTuple):
    """One set, on the GPU. Frames and embeddings want gradients."""

    frames: Tensor  # [rows, dim]
    label_embeddings: Tensor  # [classes, dim] float32
    labels: Tensor  # [rows] int64
    index: Tensor  # [kept] int64, ascending: the masked frames


def draw(size: Size, classes: int, dtype: torch.dtype) -> Inputs:
    frames = torch.randn(size.rows, size.final_dim, device="cuda").to(dtype).requires_grad_()
    label_embeddings = torch.rand(
        classes, size.final_dim, device="cuda"
    ).requires_grad_()  # as the model initialises them
    labels = torch.randint(classes, (size.rows,), device="cuda")
    index = torch.randperm(size.rows, device="cuda")[: size.kept].sort().values
    return Inputs(frames, label_embeddings, labels, index)


def normalised_logits(product: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Logits of (frames, embeddings, labels) as PyTorch computes them best: normalise, then one product in dtype ``product``."""

    def logits(frames: Tensor, label_embeddings: Tensor, labels: Tensor) -> Tensor:
        x, embeddings = (F.normalize(each.float(), eps=1e-8).to(product) for each in (frames, label_embeddings))
        scores = (x @ embeddings.T).float() / 0.1
        others = scores.scatter(1, labels[:, None], float("-inf"))
        return torch.cat([scores.gather(1, labels[:, None]), others], 1).to(frames.dtype)

    return logits


def torchaudio_logits() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """torchaudio's own function, or None where it is not installed."""
    from benchmarks.torchaudio_peer import import_models, installed

    if not installed():
        return None
    import_models()
    from torchaudio.models.wav2vec2 import components

    return lambda frames, label_embeddings, labels: components._compute_logits(frames, labels, label_embeddings)


def torchaudio_fits(size: Size, classes: int) -> bool:
    """Whether its broadcasts of [classes + 1, kept, dim] do: about ten of float32 live at a time in the backward."""
    needed = 10 * 4 * (classes + 1) * size.kept * size.final_dim
    return needed < torch.cuda.mem_get_info()[0]


def work(size: Size, classes: int, dtype: torch.dtype, *, backward: bool, logits: bool) -> Work:
    """Frames and embeddings read once (twice with a backward), gradients written once, and one product (three)."""
    values, parameters = size.kept * size.final_dim * dtype.itemsize, 4 * classes * size.final_dim
    passes = 3 if backward else 1
    moved = passes * (values + parameters)
    if logits:
        moved += (2 if backward else 1) * size.kept * (1 + classes) * dtype.itemsize
    return Work(moved, passes * 2.0 * size.kept * classes * size.final_dim)


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="model whose shapes are taken")
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 500, 2000, 10_000])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the frames")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu_timing.require_gpu()
    torch.manual_seed(0)
    return arguments


Side = Callable[[Inputs], Sequence[Tensor]]  # the result, and with a backward the gradients of frames and embeddings


def case(
    name: str, sides: Mapping[str, Side], truth: Side, sets: Sequence[Inputs], least: Work, limit: Limits, repeats: int
) -> dict[str, Any]:
    """Times of ``sides``, after each has been held against ``truth`` on float32 frames; ratios to torchaudio where it is one."""
    _check(sides, truth, sets[0])
    calls = {each: (lambda i, side=side: side(sets[i % len(sets)])) for each, side in sides.items()}
    rows = gpu_timing.in_turn(calls, least, limit, repeats=repeats)
    theirs = next((row for row in rows if row["implementation"] == "torchaudio"), None)
    if theirs is not None:
        for row in rows:
            row["times_faster_than_torchaudio"] = theirs["seconds"]["median"] / row["seconds"]["median"]
            row["share_of_torchaudios_memory"] = row["peak_bytes"] / theirs["peak_bytes"]
        ours = rows[0]
        name += (
            f": {ours['implementation']} {ours['times_faster_than_torchaudio']:.1f} times as fast as torchaudio, with "
            f"{ours['share_of_torchaudios_memory']:.1%} of its memory"
        )
    return {"case": name, "rows": rows}


def _check(sides: Mapping[str, Side], truth: Side, inputs: Inputs) -> None:
    wide = inputs._replace(frames=inputs.frames.detach().float().requires_grad_())
    expected = [each.detach().float() for each in truth(wide)]
    for name, side in sides.items():
        for number, (given, wanted) in enumerate(zip(side(inputs), expected, strict=True)):
            finite = wanted.isfinite()
            error = float((given.detach().float() - wanted)[finite].norm() / wanted[finite].norm())
            if not error < _TOLERANCE:
                raise SystemExit(f"{name} is wrong: its result {number} is off by {error:.2g} of the norm")
