"""Problems for the convolutional front end: layers, parameters and audio of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from hubert_fast import backend
from hubert_fast.ops.conv_frontend import Arguments, conv_frontend
from hubert_fast.reference import conv_frontend as reference
from tests.ops.comparison import error

HUBERT = [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)]


class Problem:
    """Random parameters and audio, and what backends make of them. Numbers are rounded to ``dtype`` and held in float64."""

    def __init__(
        self, shapes, *, norm, bias=True, batch=2, samples=3000, channels=8, valid=None, scale=1.0, offset=0.0, seed=0,
        dtype=torch.float64, device="cpu",
    ):  # fmt: skip
        """``channels``: of every layer, or of each; ``scale`` and ``offset``: of the audio."""
        self.shapes, self.norm, self.dtype = shapes, norm, dtype
        self.valid = None if valid is None else valid.to(device)
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        channels = [channels] * len(shapes) if isinstance(channels, int) else channels[: len(shapes)]
        norms = channels[:1] if norm == "group_norm" else channels
        groups = [
            [
                randn(out, into, kernel) * (2 / (into * kernel)) ** 0.5
                for into, out, (kernel, _) in zip([1, *channels], channels, shapes)
            ],
            [0.1 * randn(out) for out in channels] if bias else [],
            [1 + 0.2 * randn(out) for out in norms],
            [0.3 * randn(out) for out in norms],
        ]
        self.groups = [[each.to(dtype).double().to(device) for each in group] for group in groups]
        self.strides = [stride for _, stride in shapes]
        frames = reference.output_length(samples, *zip(*shapes))
        audio = scale * randn(batch, samples) + offset, randn(batch, frames, channels[-1])
        self.waveforms, self.direction = (each.to(dtype).double().to(device) for each in audio)

    def changed(self, **attributes: Any) -> Problem:
        """The same with other values of some attributes."""
        problem = copy.copy(self)
        vars(problem).update(attributes)
        return problem

    def arguments(self, dtype: Optional[torch.dtype] = None) -> Arguments:
        """In ``dtype``, or in the problem's."""
        dtype = self.dtype if dtype is None else dtype
        groups = [[each.to(dtype, copy=True) for each in group] for group in self.groups]
        return Arguments(self.waveforms.to(dtype), *groups, self.strides, self.norm, self.valid, dtype)

    def reference(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The features and every gradient by the formulas, whatever the operator makes of its arguments."""
        return self._both_ways(reference.conv_frontend, dtype)

    def run(self, name: str, dtype: Optional[torch.dtype] = None) -> list[Tensor]:
        """The features and every gradient on backend ``name``; a gradient that does not exist is 0."""
        with backend.using(name, "conv_frontend"):
            return self._both_ways(conv_frontend, dtype)

    @torch.no_grad()
    def features(self, name: str) -> Tensor:
        """The features alone, on backend ``name``."""
        with backend.using(name, "conv_frontend"):
            return self.call(conv_frontend, self.arguments())

    def call(self, function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
        settings = {"strides": arguments.strides, "norm": arguments.norm, "valid_samples": arguments.valid_samples}
        return function(*arguments[:5], **settings)

    def _both_ways(self, function: Callable[..., Tensor], dtype: Optional[torch.dtype]) -> list[Tensor]:
        arguments = self.arguments(dtype)
        leaves = [each.requires_grad_() for group in arguments.parameters for each in group]
        features = self.call(function, arguments)
        grads = torch.autograd.grad(features, leaves, self.direction.to(features.dtype), allow_unused=True)
        return [features.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]


def assert_as_precise(
    run: Callable[[Problem], list[Tensor]], problems: Iterable[Problem], floor: Optional[float] = None
) -> None:
    """``run`` errs at most 1.5 times as much as PyTorch's own operations do in the problems' dtype.

    Errors are root mean squares over the problems: a single small one is luck on either side. Below ``floor`` (None: one
    rounding, for what is exact in PyTorch) none counts.
    """
    squares = []
    for problem in problems:
        floor = torch.finfo(problem.dtype).eps / 4 if floor is None else floor
        results = run(problem), problem.run("reference"), problem.run("reference", torch.float64)
        squares.append(
            [(error(ours, exact) ** 2, error(theirs, exact) ** 2) for ours, theirs, exact in zip(*results, strict=True)]
        )
    ours, pytorchs = torch.tensor(squares, dtype=torch.float64).mean(0).sqrt().unbind(1)
    assert (ours <= (1.5 * pytorchs).clamp(min=floor)).all(), (ours, pytorchs)
