"""``masked_attention`` on a GPU beside PyTorch's scaled_dot_product_attention (SDPA), with and without padding.

    python -m benchmarks.ops.bench_masked_attention
    python -m benchmarks.ops.bench_masked_attention --size base xlarge --json benchmarks/results/masked-attention-h100.json

With padding SDPA is given the padded grid and a mask of the keys, or a jagged nested tensor; without padding each of its kernels
in turn. SDPA's queries, keys and values lie in tensors of their own, so that no gradients have to be put together: its best case.
FLOPs are those of the valid frames, forward 4 and backward 10 times heads x head_dim x frames^2 of each utterance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_timing
from benchmarks.gpu_timing import Work
from hubert_fast import backend
from hubert_fast.ops.masked_attention import masked_attention
from tools.aot.sizes import SIZES, Size

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE = "cuda"
_DROPOUT = 0.1

# Relative to float32: what 16-bit attention may be off by.
_TOLERANCE = 0.03

# (output, gradients of queries, keys and values), each [valid frames, heads, head_dim].
_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    arguments = _arguments()
    gpu_timing.require_gpu()
    dtype = _DTYPES[arguments.dtype]
    limit = gpu_timing.limits(dtype)
    cases = [
        case
        for name in arguments.size
        for padded in (False, True)
        for case in _cases(name, _Problem(SIZES[name], dtype, padded), limit, arguments.repeats)
    ]
    gpu_timing.write(arguments.json, "masked_attention", cases, limit)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=["base"])
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class _Inputs(NamedTuple):
    """The leaves of one layout, and the gradient of its output."""

    leaves: tuple[Tensor, ...]
    direction: Tensor


class _Problem:
    """A batch of a model's size: utterances around the mean of the size, or without padding all of the longest."""

    def __init__(self, size: Size, dtype: torch.dtype, padded: bool) -> None:
        self.size, self.dtype, self.padded = size, dtype, padded
        lengths = torch.full((size.batch,), size.frames)
        if padded:
            shortest = 2 * size.rows / size.batch - size.frames
            lengths = torch.linspace(shortest, size.frames, size.batch).round().long()
        self.lengths, self.shortest = lengths.to(_DEVICE), int(lengths.min())
        self.offsets = F.pad(lengths.cumsum(0), (1, 0)).to(_DEVICE)
        self.valid = (torch.arange(size.frames) < lengths[:, None]).to(_DEVICE)
        self.frames, self.squares = int(lengths.sum()), float(lengths.double().square().sum())
        self.sets = gpu_timing.copies(8 * self.frames * size.dim * dtype.itemsize)

    def draw(self, seed: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """qkv [batch, frames, 3, heads, head_dim] and the gradient of the output, 0 in the padding."""
        generator, size = torch.Generator(_DEVICE).manual_seed(seed), self.size
        shapes = (3, size.heads, size.head_dim), (size.heads, size.head_dim)
        drawn = []
        for shape in shapes:
            grid = torch.randn(size.batch, size.frames, *shape, device=_DEVICE, generator=generator).to(self.dtype)
            drawn.append(grid.masked_fill(~self.valid.view(*self.valid.shape, *(1 for _ in shape)), 0).to(dtype))
        return drawn[0], drawn[1]

    def work(self, *, backward: bool) -> Work:
        size = self.size
        values = self.frames * size.dim * self.dtype.itemsize
        return Work((4 + 8 * backward) * values, (4 + 10 * backward) * size.dim * self.squares)


class _Side:
    """An implementation in its own layout of the inputs."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.inputs = [self.make(*problem.draw(seed)) for seed in range(problem.sets)]

    def make(self, qkv: Tensor, direction: Tensor) -> _Inputs:
        raise NotImplementedError

    def attend(self, leaves: tuple[Tensor, ...], dropout_p: float) -> Tensor:
        raise NotImplementedError

    def results(self, inputs: _Inputs) -> _Results:
        """Without dropout."""
        raise NotImplementedError

    def forward(self, i: int, dropout_p: float) -> Tensor:
        with torch.no_grad():
            return self.attend(self.inputs[i % len(self.inputs)].leaves, dropout_p)

    def both(self, inputs: _Inputs, dropout_p: float) -> tuple[Tensor, ...]:
        out = self.attend(inputs.leaves, dropout_p)
        return out, *torch.autograd.grad(out, inputs.leaves, inputs.direction)


class _Packed(_Side):
    """Ours, on the rows of the valid frames."""

    def make(self, qkv: Tensor, direction: Tensor) -> _Inputs:
        valid = self.problem.valid
        return _Inputs((qkv[valid].requires_grad_(),), direction[valid])

    def attend(self, leaves: tuple[Tensor, ...], dropout_p: float) -> Tensor:
        problem = self.problem
        with backend.using("triton", "masked_attention"):
            return masked_attention(leaves[0], problem.offsets, max_frames=problem.size.frames, dropout_p=dropout_p)

    def results(self, inputs: _Inputs) -> _Results:
        out, grad = self.both(inputs, 0.0)
        return out, *grad.unbind(1)


class _Grid(_Side):
    """Ours, on all rows of the padded grid."""

    def make(self, qkv: Tensor, direction: Tensor) -> _Inputs:
        return _Inputs((qkv.flatten(0, 1).requires_grad_(),), direction.flatten(0, 1))

    def attend(self, leaves: tuple[Tensor, ...], dropout_p: float) -> Tensor:
        size = self.problem.size
        offsets = torch.arange(size.batch + 1, device=_DEVICE) * size.frames
        with backend.using("triton", "masked_attention"):
            return masked_attention(
                leaves[0], offsets, self.problem.lengths, max_frames=size.frames, dropout_p=dropout_p
            )

    def results(self, inputs: _Inputs) -> _Results:
        out, grad = self.both(inputs, 0.0)
        valid = self.problem.valid.flatten()
        return out[valid], *(each[valid] for each in grad.unbind(1))


class _Sdpa(_Side):
    """PyTorch's on the grid: by ``kernel``, or the one that it chooses itself; with a mask of the keys where there is padding."""

    def __init__(self, problem: _Problem, kernel: SDPBackend | None = None) -> None:
        self.kernel = kernel
        super().__init__(problem)
        self.mask = problem.valid[:, None, None] if problem.padded else None

    def make(self, qkv: Tensor, direction: Tensor) -> _Inputs:
        leaves = tuple(each.contiguous().requires_grad_() for each in qkv.unbind(2))
        return _Inputs(leaves, direction)

    def attend(self, leaves: tuple[Tensor, ...], dropout_p: float) -> Tensor:
        heads = (each.transpose(1, 2) for each in leaves)
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(*heads, attn_mask=self.mask, dropout_p=dropout_p).transpose(1, 2)

    def results(self, inputs: _Inputs) -> _Results:
        return tuple(each[self.problem.valid] for each in self.both(inputs, 0.0))


class _Jagged(_Side):
    """PyTorch's on nested tensors of the packed rows, which it hands to its flash kernel for variable lengths."""

    def make(self, qkv: Tensor, direction: Tensor) -> _Inputs:
        valid = self.problem.valid
        leaves = tuple(each.contiguous().requires_grad_() for each in qkv[valid].unbind(1))
        return _Inputs(leaves, direction[valid])

    def attend(self, leaves: tuple[Tensor, ...], dropout_p: float) -> Tensor:
        problem = self.problem
        bounds = {"min_seqlen": problem.shortest, "max_seqlen": problem.size.frames}
        heads = (
            torch.nested.nested_tensor_from_jagged(each, problem.offsets, **bounds).transpose(1, 2) for each in leaves
        )
        return F.scaled_dot_product_attention(*heads, dropout_p=dropout_p).transpose(1, 2).values()

    def results(self, inputs: _Inputs) -> _Results:
        return self.both(inputs, 0.0)


def _sides(problem: _Problem) -> Iterator[tuple[str, Callable[[], _Side]]]:
    yield "triton", lambda: _Packed(problem)
    if problem.padded:
        yield "triton, padded rows", lambda: _Grid(problem)
        yield "SDPA, mask", lambda: _Sdpa(problem)
    else:
        yield "SDPA, flash", lambda: _Sdpa(problem, SDPBackend.FLASH_ATTENTION)
        yield "SDPA, cuDNN", lambda: _Sdpa(problem, SDPBackend.CUDNN_ATTENTION)
        yield "SDPA, memory-efficient", lambda: _Sdpa(problem, SDPBackend.EFFICIENT_ATTENTION)
    yield "SDPA, jagged", lambda: _Jagged(problem)


def _cases(name: str, problem: _Problem, limit: gpu_timing.Limits, repeats: int) -> list[dict[str, Any]]:
    """Forward, and forward with backward, each without and with dropout."""
    size, sides = problem.size, _checked_sides(problem)
    share = problem.frames / (size.batch * size.frames)
    description = (
        f"{name}, {str(problem.dtype).removeprefix('torch.')}, {size.batch} x {size.frames} frames, {share:.0%} valid, "
        f"{size.heads} heads of {size.head_dim}"
    )
    cases = []
    for dropout_p in (0.0, _DROPOUT):
        for backward in (False, True):
            calls = {each: _call(side, dropout_p, backward) for each, side in sides.items()}
            rows = gpu_timing.in_turn(calls, problem.work(backward=backward), limit, repeats=repeats)
            what = "forward and backward" if backward else "forward"
            cases.append({"case": f"{what}, dropout {dropout_p}: {description}", "rows": rows})
    return cases


def _call(side: _Side, dropout_p: float, backward: bool) -> Callable[[int], Any]:
    if backward:
        return lambda i: side.both(side.inputs[i % len(side.inputs)], dropout_p)
    return lambda i: side.forward(i, dropout_p)


def _checked_sides(problem: _Problem) -> dict[str, _Side]:
    """Those that agree with attention in float32, output and gradients. What this PyTorch cannot run is left out, and said."""
    exact = _Sdpa(problem, SDPBackend.MATH)
    truth = exact.results(exact.make(*problem.draw(0, torch.float32)))
    del exact
    sides = {}
    for name, make in _sides(problem):
        try:
            side = make()
            results = side.results(side.inputs[0])
            side.both(side.inputs[0], _DROPOUT)
        except RuntimeError as reason:
            if name == "triton":
                raise
            print(f"{name} is left out: {str(reason).splitlines()[0]}")
            continue
        for what, given, wanted in zip(("output", "dQ", "dK", "dV"), results, truth, strict=True):
            given, wanted = given.detach().float(), wanted.detach()
            error = float((given - wanted).norm() / wanted.norm())
            if not error < _TOLERANCE:
                raise SystemExit(f"{name} is wrong: its {what} is off by {error:.2g} of the norm")
        sides[name] = side
    return sides


if __name__ == "__main__":
    main()
