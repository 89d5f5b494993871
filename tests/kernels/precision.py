"""Kernels against the truth where they draw masks of their own: float64 of a reference that is given the same masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hubert_fast.torch_backend.dropout_mask import SECOND_MASK
from tests.kernels import dropout_twin
from tests.kernels.device import DEVICE
from tests.ops.comparison import error, run


def kept(seed: int, rows: int, channels: int, p: float, *, second: bool = False) -> Tensor | None:
    """What a kernel's dropout of [rows, channels] keeps, bool; None where ``p`` is 0."""
    if p == 0.0:
        return None
    row, column = torch.arange(rows)[:, None], torch.arange(channels)[None]
    return dropout_twin.keep(seed ^ SECOND_MASK if second else seed, row, column, p).to(DEVICE)


def assert_kernels_as_precise(
    operator: str,
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    draw: Callable[[int], Sequence[Tensor]],
    dtype: torch.dtype,
    *,
    seeds: int,
    roundings: float = 0.25,
) -> None:
    """``function`` on backend "triton" errs at most 1.5 times as much as ``plain``, PyTorch's own operations, in ``dtype``.

    The truth is ``plain`` in float64. Errors are root mean squares over ``seeds`` draws. ``roundings`` (of a unit in the last
    place) are always allowed: 0.25 is what a result has that is rounded once, 0.5 what a single unlucky number has.
    """
    ours, pytorchs = [], []
    for seed in range(seeds):
        inputs = [each.to(DEVICE, dtype if each.is_floating_point() else None) for each in draw(seed)]
        wide = [each.double() if each.is_floating_point() else each for each in inputs]
        truth = run(operator, "reference", plain, wide, seed)
        for errors, side, candidate in ((ours, "triton", function), (pytorchs, "reference", plain)):
            results = run(operator, side, candidate, inputs, seed)
            errors.append([error(*pair) for pair in zip(results, truth, strict=True)])
    ours, pytorchs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, pytorchs))
    allowed = (1.5 * pytorchs).clamp(min=torch.finfo(dtype).eps * roundings)
    assert (ours <= allowed).all(), (ours, pytorchs)
