"""Launches of PyTorch's operations on lists of tensors, as a GPU makes them: a CPU takes the tensors one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# MultiTensorApply.cuh of PyTorch: values that a block takes, blocks a launch, and tensors a launch by how many lists there are.
_CHUNK, _BLOCKS = 65_536, 320
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
# A fused optimizer reads weights, gradients and two moments; its counts of steps ride along.
_LISTS_OF_OPTIMIZER = 4


def launches(tensors: Sequence[Tensor], lists: int) -> int:
    """Launches for ``tensors`` in each of ``lists`` lists."""
    count = in_launch = blocks = 0
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        in_launch += 1
        chunks = -(-tensor.numel() // _CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            if blocks == _BLOCKS or (in_launch == _TENSORS[lists] and chunk == chunks):
                count, blocks, in_launch = count + 1, 0, int(chunk < chunks)
    return count + (blocks > 0)


@contextlib.contextmanager
def counted(title: str) -> Iterator[list[int]]:
    """Count launches of operations on lists inside, each under the profiler's name ``title``; yields a list of the counts."""
    counts: list[int] = []

    def watched(name: str) -> Any:
        function = getattr(torch, name)

        def call(*arguments: Any, **named: Any) -> Any:
            lists = [each for each in arguments if isinstance(each, (list, tuple)) and each]
            tensors = [each for each in lists if isinstance(each[0], Tensor)]
            if name.startswith("_fused_"):
                found = launches(tensors[0], _LISTS_OF_OPTIMIZER)
            elif name == "_foreach_norm":
                found = launches(tensors[0], 1) + 2  # zeros for the partial sums, and one over them
            else:
                found = launches(tensors[0], len(tensors) + (not name.endswith("_")))
            counts.append(found)
            with torch.profiler.record_function(title):
                return function(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for name in dir(torch):
            if name.startswith(("_foreach_", "_fused_a", "_fused_s")):
                stack.enter_context(mock.patch.object(torch, name, watched(name)))
        yield counts
