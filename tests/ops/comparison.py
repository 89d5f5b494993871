"""How an implementation is held against the truth: float64 of the reference (design.md, "Numerics")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import pytest
import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops import triton_backend
from tests.kernels.device import DEVICE

_TRITON = pytest.param("triton", marks=[pytest.mark.gpu] if DEVICE.type == "cuda" else [])
on_every_backend = pytest.mark.parametrize(
    "name", ["torch", "reference", *([_TRITON] if triton_backend.why_not() is None else [])]
)


def device_of(name: str) -> torch.device:
    """Where the tests run backend ``name``."""
    return DEVICE if name == "triton" else torch.device("cpu")


def run(
    operator: str, name: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """The output of ``function(*inputs)`` on backend ``name``, then the gradient of every floating input.

    The gradient is that of a random projection of the output, so no element of it is special.
    """
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
    with backend.using(name, operator):
        output = function(*leaves)
    direction = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    finite = output.masked_fill(output.isinf(), 0.0)
    (finite * direction.to(output)).sum().backward()
    return [output.detach(), *(each.grad for each in leaves if each.is_floating_point())]


def error(given: Tensor, truth: Tensor) -> float:
    """|given - truth| / |truth|; infinities must agree, a truth of 0 is met absolutely, and NaN is an error of none."""
    assert given.shape == truth.shape
    assert torch.equal(given.isinf(), truth.isinf())
    assert not given.isnan().any() and not truth.isnan().any()  # ``max`` of errors would pass over it
    given, truth = (each.detach().double().masked_fill(each.isinf(), 0.0) for each in (given, truth))
    norm = truth.norm()
    return float((given - truth).norm() / (norm if norm > 1e-9 else 1.0))


def assert_twins(
    operator: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """Backends "torch" and "reference" agree on float64 ``inputs``, forward and every gradient."""
    pairs = zip(run(operator, "torch", function, inputs), run(operator, "reference", function, inputs), strict=True)
    errors = [error(given, truth) for given, truth in pairs]
    assert max(errors) <= tolerance, errors


def assert_as_precise(
    operator: str,
    function: Callable[..., Tensor],
    draw: Callable[[int], Sequence[Tensor]],
    dtype: torch.dtype,
    *,
    name: str = "torch",
    plain: Optional[Callable[..., Tensor]] = None,
    seeds: int = 8,
    roundings: float = 0.25,
) -> None:
    """In ``dtype``, backend ``name`` errs at most 1.5 times as much as PyTorch's own operations do.

    Those are the reference, or ``plain`` where PyTorch has another formulation of the same cost. ``draw(seed)`` gives
    float64 inputs; they are rounded to ``dtype`` first, so both sides and the truth see the same numbers. Errors are
    root mean squares over ``seeds`` draws: a single small one is luck on either side. ``roundings`` (of a unit in the last
    place) are always allowed: 0.25 is what a result has that is rounded once, 0.5 what a single unlucky number has.
    """
    ours, pytorchs = [], []
    for seed in range(seeds):
        inputs = [each.to(dtype) if each.is_floating_point() else each for each in draw(seed)]
        wide = [each.double() if each.is_floating_point() else each for each in inputs]
        truth = run(operator, "reference", function, wide, seed)
        for errors, side, candidate in ((ours, name, function), (pytorchs, "reference", plain or function)):
            results = run(operator, side, candidate, inputs, seed)
            errors.append([error(*pair) for pair in zip(results, truth, strict=True)])
    ours, pytorchs = (torch.tensor(each).square().mean(0).sqrt() for each in (ours, pytorchs))
    allowed = (1.5 * pytorchs).clamp(min=torch.finfo(dtype).eps * roundings)
    assert (ours <= allowed).all(), (ours, pytorchs)
