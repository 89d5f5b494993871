"""Timing of passes over rows: forward and backward beside a copy of the same bytes, PyTorch's operations and torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import gpu_timing
from benchmarks.gpu_timing import Limits, Work
from hubert_fast import backend
from tools.aot.sizes import SIZES, Size


@dataclass(frozen=True)
class Case:
    """One operator call. Tensors are given and returned as tuples; both functions take what ``draw`` returns."""

    name: str
    draw: Callable[[], tuple[Tensor, ...]]  # fresh inputs on the GPU; floating ones get gradients
    operator: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]  # the same in PyTorch's operations
    forward_bytes: int  # each tensor of rows read or written once
    backward_bytes: int
    random: bool  # dropout: results of the two differ


def main(operator: str, description: str, cases: Callable[[Size, torch.dtype], Sequence[Case]]) -> None:
    """Measure ``cases`` in the shapes and dtype of the command line; print, and write where ``--json`` says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="model whose shapes are taken")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu_timing.require_gpu()
    torch.manual_seed(0)
    # torch.compile's backwards must survive being called again on the same graph.
    functorch_config.donated_buffer = False
    dtype = getattr(torch, arguments.dtype)
    limit = gpu_timing.limits(dtype)
    measured = []
    with backend.using("triton", operator):
        for case in cases(SIZES[arguments.size], dtype):
            if not case.random:
                _check(case)
            name = f"{arguments.size}, {arguments.dtype}, {case.name}"
            measured += _measure(case, name, limit, arguments.repeats)
    gpu_timing.write(arguments.json, operator, measured, limit)


def _check(case: Case) -> None:
    """Both functions give the same results and gradients, to 16 bits' precision."""
    inputs = case.draw()
    results = []
    for function in (case.operator, case.plain):
        outputs = function(*inputs)
        torch.manual_seed(1)
        gradients = [torch.randn_like(each) for each in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, _leaves(inputs), gradients)])
    for ours, theirs in zip(*results, strict=True):
        difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not difference < 0.02:
            raise SystemExit(f"{case.name}: results differ by {difference:.3g} of their norm")


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [each for each in inputs if each.requires_grad]


def _measure(case: Case, name: str, limit: Limits, repeats: int) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    sides = {"triton": case.operator, "PyTorch": case.plain, "torch.compile": torch.compile(case.plain)}
    sets = [case.draw() for _ in range(gpu_timing.copies(case.forward_bytes))]
    forwards = {side: _forward(function, sets) for side, function in sides.items()}
    backwards = {side: _backward(function, sets) for side, function in sides.items()}
    cases = []
    for direction, calls, moved in (
        ("forward", forwards, case.forward_bytes),
        ("backward", backwards, case.backward_bytes),
    ):
        calls = calls | {"copy of the same bytes": _copy(moved, len(sets))}
        rows = gpu_timing.in_turn(calls, Work(moved), limit, repeats=repeats)
        cases.append({"case": f"{name}: {direction}", "rows": rows})
    return cases


def _forward(function: Callable[..., tuple[Tensor, ...]], sets: Sequence[tuple[Tensor, ...]]) -> Callable[[int], Any]:
    return lambda i: function(*sets[i % len(sets)])


def _backward(function: Callable[..., tuple[Tensor, ...]], sets: Sequence[tuple[Tensor, ...]]) -> Callable[[int], Any]:
    """Only the backward is timed: its graphs are built here."""
    graphs = []
    for inputs in sets:
        outputs = function(*inputs)
        graphs.append((outputs, _leaves(inputs), [torch.randn_like(each) for each in outputs]))

    def call(i: int) -> Any:
        outputs, leaves, gradients = graphs[i % len(graphs)]
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return call


def _copy(moved: int, sets: int) -> Callable[[int], Any]:
    """Half of the bytes are read, half written."""
    pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in range(sets)]
    return lambda i: pairs[i % sets][1].copy_(pairs[i % sets][0])


def rows(count: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Random activations that want a gradient."""
    return torch.randn(count, channels, device="cuda", dtype=dtype, requires_grad=True)


def vector(channels: int) -> Tensor:
    """A random parameter: float32, as under autocast."""
    return torch.randn(channels, device="cuda", requires_grad=True)
