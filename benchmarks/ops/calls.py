"""Calls of a case's implementations: each is held against the truth first, then called on sets of inputs in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_fast import tf32

from ..clock import synchronize
from .case import Function, Inputs, OperatorCase, Side

# Relative to the norm of float32's results. A TF32 product is off by some 5e-4, and PyTorch's LayerNorm in bfloat16, which adds
# the gradients of its parameters up in bfloat16, by 0.035.
_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.01}

_MOST_SETS = 64
_ASSUMED_CACHE = 32 << 20  # where the system does not say


class WrongResult(Exception):
    """An implementation does other work than the others: its time means nothing."""


class Calls:
    """Of one case. Inputs and the truth's results are kept for as long as this is."""

    def __init__(self, case: OperatorCase) -> None:
        self.case = case
        self._truth: list[Tensor] = []
        self._sets: dict[Any, list[Inputs]] = {}
        self._compiler_is_fresh = False

    def make(self, name: str) -> tuple[Callable[[int], Any], float]:
        """``call(i)``, which works on another set of inputs for each ``i``, and by how much its results differ from the truth's.

        It has been called on every kind of inputs when this returns: whatever is compiled, tuned or loaded for them is there.

        Raises:
            WrongResult: where that is more than the case allows.
        """
        side = self.case.sides[name]
        function = self._compiled(side.function) if side.compiled else side.function
        error = self._checked(name, side, function)
        sets = self._with_directions(function, self._sets_of(side))
        run, dropout_p = _with_gradients if self.case.backward else _without_gradients, self.case.dropout_p
        kinds = {_kind(each): each for each in sets}
        for inputs in kinds.values():
            run(function, inputs, dropout_p)
        synchronize(self.case.device)
        first = self._first_set(name, len(sets)) if len(kinds) == 1 else 0
        return lambda i: run(function, sets[(first + i) % len(sets)], dropout_p), error

    def _first_set(self, name: str, count: int) -> int:
        """Implementations begin far apart: what the one before has just worked on would lie in the cache."""
        names = list(self.case.sides)
        return count * names.index(name) // len(names)

    def _compiled(self, function: Function) -> Callable[..., Any]:
        if not self._compiler_is_fresh:
            torch.compiler.reset()  # or the compiler gives up on a function after its eighth case
            self._compiler_is_fresh = True
        return torch.compile(function, dynamic=False)

    def _sets_of(self, side: Side) -> list[Inputs]:
        """As many as do not fit into the cache together; implementations with the same layout share them."""
        if side.prepare not in self._sets:
            first = side.prepare(self.case.draw(0))
            each = sum(tensor.nbytes for tensor in first.tensors)
            count = min(_MOST_SETS, max(2, -(-3 * _cache_bytes(self.case.device) // max(1, each))))
            rest = [side.prepare(self.case.draw(seed)) for seed in range(1, count)]
            self._sets[side.prepare] = [first, *rest]
        return self._sets[side.prepare]

    def _with_directions(self, function: Callable[..., Any], sets: list[Inputs]) -> list[Inputs]:
        """``sets`` with gradients of the outputs in the outputs' dtypes, so that no cast is timed."""
        if not self.case.backward:
            return sets
        dtypes = [each.dtype for each in function(sets[0].tensors, self.case.dropout_p)]
        return [
            each._replace(directions=tuple(tensor.to(dtype) for tensor, dtype in zip(each.directions, dtypes)))
            for each in sets
        ]

    def _checked(self, name: str, side: Side, function: Callable[..., Any]) -> float:
        """Dropout is off: what is dropped differs between implementations."""
        allowed = _TOLERANCES[self.case.dtype] if self.case.tolerance is None else self.case.tolerance
        (inputs,) = self._with_directions(function, self._sets_of(side)[:1])
        given = side.canonical(self._results(function, inputs))
        errors = [_difference(each, wanted) for each, wanted in zip(given, self._expected(), strict=True)]
        for number, error in enumerate(errors):
            if not error <= allowed:
                what = f"result {number} of {len(errors)} (outputs, then gradients)"
                raise WrongResult(f"{name} is wrong: its {what} is off by {error:.2g} of the norm")
        return max(errors)

    def _expected(self) -> list[Tensor]:
        if not self._truth:
            truth = self.case.truth
            with tf32.allowed(False):
                inputs = truth.prepare(_widened(self.case.draw(0)))
                self._truth = list(truth.canonical(self._results(truth.function, inputs)))
        return self._truth

    def _results(self, function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        """Outputs, then gradients where the case has them; the same random numbers for every implementation."""
        torch.manual_seed(0)
        run = _with_gradients if self.case.backward else _without_gradients
        return [each.detach() for each in run(function, inputs, 0.0)]


def _without_gradients(function: Callable[..., Any], inputs: Inputs, dropout_p: float) -> Sequence[Tensor]:
    with torch.no_grad():
        return function(inputs.tensors, dropout_p)


def _with_gradients(function: Callable[..., Any], inputs: Inputs, dropout_p: float) -> Sequence[Tensor]:
    outputs = function(inputs.tensors, dropout_p)
    leaves = [each for each in inputs.tensors if each.requires_grad]
    return *outputs, *torch.autograd.grad(outputs, leaves, inputs.directions)


def _kind(inputs: Inputs) -> tuple[Any, ...]:
    """The properties of inputs by which kernels are compiled and chosen."""
    tensors = [tensor for group in inputs for tensor in group]
    return tuple((each.shape, each.stride(), each.dtype, each.data_ptr() % 16) for each in tensors)


def _widened(inputs: Inputs) -> Inputs:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().float().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor

    return Inputs(*(tuple(wide(each) for each in group) for group in inputs))


def _difference(given: Tensor, wanted: Tensor) -> float:
    """Relative to the norm, over what is finite; infinite where other entries are, or where shapes differ."""
    if given.shape != wanted.shape:
        return float("inf")
    given, wanted = given.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(given.isfinite(), finite):
        return float("inf")
    return float((given - wanted)[finite].norm() / wanted[finite].norm().clamp(min=1e-30))


def _cache_bytes(device: str) -> int:
    """Of a GPU's L2 or of the CPU's last level."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [text.read_text().strip() for text in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units), default=_ASSUMED_CACHE)
