"""``positional_conv`` on a GPU beside cuDNN's grouped convolution with GELU and residual, eager and compiled.

    python -m benchmarks.ops.bench_positional_conv
    python -m benchmarks.ops.bench_positional_conv --size base large --json benchmarks/results/positional-conv-h100.json

The model's parameters are float32 and its rows 16-bit, so every side normalises and casts the weight too. Ours works on packed
rows; the others are handed the padded grid, and packing is not counted against them. FLOPs are those of the valid frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.gpu_timing import Work
from hubert_fast import backend
from hubert_fast.ops.positional_conv import positional_conv
from tools.aot.sizes import SIZES, Size

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE = "cuda"

# Relative to the reference in float32: what a bfloat16 convolution of 128 taps may be off by.
_TOLERANCE = 0.03


def main() -> None:
    arguments = _arguments()
    gpu_timing.require_gpu()
    torch.backends.cudnn.benchmark = True  # cuDNN is to take its fastest algorithm
    dtype = _DTYPES[arguments.dtype]
    limit = gpu_timing.limits(dtype)
    cases = [
        case
        for name in arguments.size
        for padded in (True, False)
        for case in _cases(name, _Problem(SIZES[name], dtype, padded), limit, arguments.repeats)
    ]
    gpu_timing.write(arguments.json, "positional_conv", cases, limit)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=["base"])
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class _Inputs(NamedTuple):
    """One set: the same frames packed and padded. The floating tensors but the directions want gradients."""

    rows: Tensor  # [rows, channels]
    grid: Tensor  # [batch, frames, channels]
    weight: Tensor  # [channels, channels / groups, taps] float32
    bias: Tensor  # [channels] float32
    gain: Tensor  # [1, 1, taps] float32
    rows_direction: Tensor  # gradient of the output, packed
    grid_direction: Tensor  # and padded


class _Problem:
    """A batch of a model's size: utterances of 60 to 100% of the longest, or without padding all of the longest."""

    def __init__(self, size: Size, dtype: torch.dtype, padded: bool) -> None:
        self.size, self.dtype = size, dtype
        lengths = torch.full((size.batch,), size.frames)
        if padded:
            shortest = 2 * size.rows / size.batch - size.frames
            lengths = torch.linspace(shortest, size.frames, size.batch).round().long()
        self.offsets = F.pad(lengths.cumsum(0), (1, 0)).to(_DEVICE)
        self.valid = (torch.arange(size.frames) < lengths[:, None]).to(_DEVICE)
        self.frames = int(lengths.sum())
        sets = gpu_timing.copies(self.bytes(backward=False))
        self.sets = [self._draw(seed) for seed in range(sets)]

    def _draw(self, seed: int) -> _Inputs:
        generator, size = torch.Generator(_DEVICE).manual_seed(seed), self.size

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=_DEVICE, generator=generator)

        grids = [randn(size.batch, size.frames, size.dim).to(self.dtype) * self.valid[:, :, None] for _ in range(2)]
        rows = [grid[self.valid] for grid in grids]
        weight, bias = randn(size.dim, size.group_channels, size.taps), 0.1 * randn(size.dim)
        gain = 1.0 + randn(1, 1, size.taps).abs()
        leaves = [each.requires_grad_() for each in (rows[0], grids[0], weight, bias, gain)]
        return _Inputs(*leaves, rows[1], grids[1])

    def bytes(self, *, backward: bool) -> float:
        """Of rows in and out and the parameters; in the backward also preactivation and both gradients."""
        size = self.size
        values, parameters = (
            self.frames * size.dim * self.dtype.itemsize,
            4 * size.dim * size.group_channels * size.taps,
        )
        return 3 * values + parameters + (backward and 4 * values + 2 * parameters)

    def work(self, *, backward: bool) -> Work:
        size = self.size
        flops = 2.0 * self.frames * size.dim * size.group_channels * size.taps
        return Work(self.bytes(backward=backward), 3 * flops if backward else flops)


def _conv1d(inputs: _Inputs, groups: int) -> Tensor:
    """As torchaudio computes it: [batch, channels, frames], cuDNN's grouped convolution, one frame too many cut off."""
    x = inputs.grid.transpose(1, 2)
    filters = torch._weight_norm(inputs.weight, inputs.gain, 2).to(x.dtype)
    padding = filters.shape[2] // 2
    z = F.conv1d(x, filters, inputs.bias.to(x.dtype), padding=padding, groups=groups)[:, :, : x.shape[2]]
    return F.gelu(z).transpose(1, 2) + inputs.grid


def _conv2d_channels_last(inputs: _Inputs, groups: int) -> Tensor:
    """The same in the memory format that cuDNN's tensor-core kernels prefer; [batch, channels, 1, frames]."""
    x = inputs.grid.transpose(1, 2)[:, :, None]
    filters = torch._weight_norm(inputs.weight, inputs.gain, 2).to(x.dtype)[:, :, None]
    filters = filters.to(memory_format=torch.channels_last)
    padding = (0, filters.shape[3] // 2)
    z = F.conv2d(x, filters, inputs.bias.to(x.dtype), padding=padding, groups=groups)[:, :, 0, : x.shape[3]]
    return F.gelu(z).transpose(1, 2) + inputs.grid


def _cases(name: str, problem: _Problem, limit: gpu_timing.Limits, repeats: int) -> list[dict[str, Any]]:
    """Forward, and forward with backward."""
    size, groups = problem.size, problem.size.groups

    def ours(inputs: _Inputs, groups: int) -> Tensor:
        settings = {"groups": groups, "max_frames": size.frames, "gain": inputs.gain}
        with backend.using("triton", "positional_conv"):
            return positional_conv(inputs.rows, inputs.weight, inputs.bias, problem.offsets, **settings)

    plain = {"conv1d": _conv1d, "conv2d channels-last": _conv2d_channels_last}
    sides = {"triton": ours, **plain, **{f"{each}, compiled": torch.compile(call) for each, call in plain.items()}}
    _check(problem, sides)
    share = problem.frames / (size.batch * size.frames)
    description = (
        f"{name}, {str(problem.dtype).removeprefix('torch.')}, {size.batch} x {size.frames} frames, {share:.0%} valid"
    )

    def forward(side: Callable[..., Tensor]) -> Callable[[int], Any]:
        def call(i: int) -> Tensor:
            with torch.no_grad():
                return side(problem.sets[i % len(problem.sets)], groups)

        return call

    def both(side: Callable[..., Tensor]) -> Callable[[int], Any]:
        return lambda i: _step(side, problem.sets[i % len(problem.sets)], groups)

    cases = []
    for what, timed, backward in (("forward", forward, False), ("forward and backward", both, True)):
        calls = {each: timed(side) for each, side in sides.items()}
        rows = gpu_timing.in_turn(calls, problem.work(backward=backward), limit, repeats=repeats)
        cases.append({"case": f"{what}: {description}", "rows": rows})
    return cases


def _step(side: Callable[..., Tensor], inputs: _Inputs, groups: int) -> tuple[Tensor, ...]:
    """The output, and the gradients of x, weight, bias and gain."""
    out = side(inputs, groups)
    packed = out.ndim == 2
    leaves = [inputs.rows if packed else inputs.grid, inputs.weight, inputs.bias, inputs.gain]
    return out, *torch.autograd.grad(out, leaves, inputs.rows_direction if packed else inputs.grid_direction)


def _check(problem: _Problem, sides: dict[str, Callable[..., Tensor]]) -> None:
    """Every side agrees with cuDNN in float32, output and gradients."""
    inputs, groups = problem.sets[0], problem.size.groups
    wide = _Inputs(*(each.detach().float().requires_grad_() for each in inputs))
    truth = [
        each.detach()[problem.valid] if each.shape == inputs.grid.shape else each
        for each in _step(_conv1d, wide, groups)
    ]
    for name, side in sides.items():
        results = [each.detach() for each in _step(side, inputs, groups)]
        for what, given, wanted in zip(("output", "x", "weight", "bias", "gain"), results, truth):
            given = given[problem.valid] if given.shape == inputs.grid.shape else given
            error = float((given.float() - wanted).norm() / wanted.norm())
            if not error < _TOLERANCE:
                raise SystemExit(f"{name} is wrong: its {what} is off by {error:.2g} of the norm")


if __name__ == "__main__":
    main()
