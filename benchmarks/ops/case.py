"""What one measurement of an operator is: inputs, the least work, and the implementations that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

import hubert_fast
from hubert_fast import backend

from ..report import dtype_name

OURS = "hubert_fast"

_GPU_BACKENDS = {"conv_frontend": "cuda"}  # the other operators have Triton kernels
_CPU_BACKENDS = {"conv_frontend": "cpu"}  # of the others size and settings decide on a CPU


Tensors = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """One set. The tensors that require a gradient get one; ``directions`` are the gradients of the outputs."""

    tensors: Tensors
    directions: Tensors


# (tensors, dropout probability) -> outputs
Function = Callable[[Tensors, float], Tensors]


@dataclass(frozen=True)
class Side:
    """An implementation."""

    function: Function
    version: str
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs  # inputs in its own layout, with leaves of its own
    canonical: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple  # outputs and gradients, in that of the others
    compiled: bool = False  # torch.compile is to be put around the function


@dataclass(frozen=True)
class Work:
    """The least that has to be done: inputs read once and outputs written once, and the arithmetic. None: there is no floor."""

    bytes: Optional[float] = None
    flops: Optional[float] = None

    def __add__(self, other: Work) -> Work:
        return Work((self.bytes or 0.0) + (other.bytes or 0.0), (self.flops or 0.0) + (other.flops or 0.0))


@dataclass(frozen=True)
class OperatorCase:
    """Implementations that do the same work, and the work. Nothing is drawn or computed before it is asked for."""

    name: str
    shape: dict[str, Any]
    device: str
    dtype: torch.dtype
    draw: Callable[[int], Inputs]  # the same inputs for the same seed
    sides: Mapping[str, Side]
    truth: Side  # what it computes of the inputs widened to float32 is right
    least: Work
    backward: bool = False  # gradients are computed too
    dropout_p: float = 0.0
    tolerance: Optional[float] = None  # of results relative to the truth's norm; None: that of one product in the dtype
    on_host: bool = False  # it runs on the CPU, whatever the device

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def title(self) -> str:
        """The case as entries of what was left out name it."""
        return f"{self.name}, {self.dtype_name}"


def both_ways(case: OperatorCase, backward: Work) -> Iterator[OperatorCase]:
    """``case`` with its backward, which is what training needs, and by itself.

    Args:
        case: of the forward, with its work.
        backward: work of the backward alone.
    """
    yield replace(case, name=f"forward and backward, {case.name}", backward=True, least=case.least + backward)
    yield replace(case, name=f"forward, {case.name}")


def ours(operator: str, device: str, call: Function, name: Optional[str] = None, **layout: Any) -> Side:
    """Ours on backend ``name``, by default the one meant for ``device``: where that cannot run, none replaces it silently."""
    if name is None:
        name = _CPU_BACKENDS.get(operator, backend.AUTO) if device == "cpu" else _GPU_BACKENDS.get(operator, "triton")

    def function(tensors: Tensors, dropout_p: float) -> Tensors:
        if name == backend.AUTO and backend.is_automatic(operator):
            return call(tensors, dropout_p)
        with backend.using(name, operator):
            return call(tensors, dropout_p)

    return Side(function, f"{hubert_fast.__version__}, backend {name}", **layout)


def pytorch(name: str, function: Function, **layout: Any) -> dict[str, Side]:
    """PyTorch's operations, by themselves and compiled."""
    side = Side(function, torch.__version__, **layout)
    return {name: side, f"{name}, compiled": replace(side, compiled=True)}


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers on the generator's device."""
    return torch.randn(shape, device=generator.device, generator=generator).to(dtype)


def generator_on(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
