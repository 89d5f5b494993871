"""Prints how often a second launch is the one that Triton itself would make, for arguments of many kinds.

    python -m tests.kernels.launched_again          (without TRITON_INTERPRET)

Nothing is compiled: Triton's launcher runs as it does, over a compiler that gives an empty kernel for each key.
"""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hubert_fast.kernels.launch import Blocks, launch


class _Gpu:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)


class _Kernel:
    """In place of a compiled kernel: notes its launches, each with itself, the grid, the stream and the arguments."""

    launches: list[tuple[Any, ...]] = []
    function = packed_metadata = launch_metadata = lambda *_: None

    def run(self, first: int, second: int, third: int, stream: int, *others: Any) -> None:
        # What stands before the kernel's six arguments is Triton's own.
        self.launches.append((self, first, second, third, stream, *others[-6:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, stream: self.run(*grid, stream, *arguments)


@triton.jit(do_not_specialize=["plain"])
def _nothing(x, y, size, plain, scale, CONSTANT: triton.language.constexpr):
    pass


def _arguments() -> list[tuple[dict[str, Any], Blocks]]:
    values = torch.zeros(64)
    tensors = [values, values[1:], values.bfloat16(), values.long(), None]
    numbers = [1, 2, 3, 16, 32, -16, 2**31 - 1, 2**31, -(2**31) - 1, 2**33, 2**63, -(2**63), True]
    tuples = [
        *itertools.product(tensors, tensors, [3], [3], [0.5], [8]),
        *itertools.product([values], [values], numbers, numbers, [0.5], [8]),
        *itertools.product([values], [None], [3, 16], [5], [0.5, 1.5, 1], [8, 16, True, None]),
    ]
    blocks = [Blocks(warps=4), Blocks(warps=8), Blocks(warps=4, stages=3)]
    names = ("x", "y", "size", "plain", "scale", "CONSTANT")
    return [(dict(zip(names, each)), chosen) for each in tuples for chosen in blocks]


def main() -> None:
    triton.runtime.driver.set_active(_Gpu)
    right, cases, grids = 0, _arguments(), itertools.cycle([(2,), (3, 4), (5, 6, 7)])
    kernels = set()
    with mock.patch.object(triton.compiler, "compile", lambda *_, **__: _Kernel()):
        for (given, blocks), grid in zip(cases, grids):
            _Kernel.launches.clear()
            kernels.add(_nothing[grid](**given, **blocks.options))
            for _ in range(2):
                launch(_nothing, lambda _, grid=grid: grid, given, [blocks])
            expected, *found = _Kernel.launches
            right += len(found) == 2 and all(a is b for each in found for a, b in zip(each, expected, strict=True))
    print(f"{right} of {len(cases)} right, {len(kernels)} kernels")


if __name__ == "__main__":
    main()
