"""CUDA graphs on a CPU: operations are noted as they run and done again on the same memory, as a graph would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubert_fast.models.optimizer_step import _can_be_captured
from hubert_fast.ops import linear


class _Recorder(TorchDispatchMode):
    """Notes operations; ``pool`` gathers what they allocate, ``before`` what else they write to, as it was."""

    def __init__(self, pool: dict[int, Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.pool, self.before = pool, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        given = [each for each in tree_leaves((arguments, named)) if isinstance(each, Tensor)]
        if function._schema.is_mutable:
            for each in given:
                if _place(each) not in self.pool:
                    self.before.setdefault(_place(each), (each.untyped_storage(), each.untyped_storage().clone()))
        result = function(*arguments, **named)
        places = {_place(each) for each in given}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _place(each) not in places:
                self.pool[_place(each)] = each
        self.calls.append((function, arguments, named, result))
        return result


class StandInCapture:
    """In place of `hubert_fast.models.capture.CudaCapture`. As a graph does, it keeps memory and runs no Python."""

    def __init__(self) -> None:
        self.graphs = self.replays = 0
        self._pool: dict[int, Tensor] = {}

    @contextmanager
    def ahead(self) -> Iterator[None]:
        yield

    def renew(self) -> None:
        self._pool.clear()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        # The recorder is a dispatch mode, under which `linear` would not go the way that it goes in a capture.
        with mock.patch.object(linear, "is_plain_call", lambda _: True), _Recorder(self._pool) as recorder:
            work()
        # A capture runs nothing: what lies elsewhere than in the pool is as before.
        for storage, before in recorder.before.values():
            storage.copy_(before)
        self.graphs += 1

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for function, arguments, named, result in recorder.calls:
                    again = function(*arguments, **named)
                    for old, new in zip(tree_leaves(result), tree_leaves(again)):
                        if isinstance(old, Tensor) and _place(old) != _place(new):
                            old.data.copy_(new)

        return replay

    def spoil(self) -> None:
        """Overwrite the pool, as another graph may have done."""
        for tensor in self._pool.values():
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def replace_capture(step: Any) -> StandInCapture:
    """Let ``step``, a `GraphedStep` on a CPU, capture all that it would on a GPU."""
    capture = StandInCapture()
    step._capture = capture
    if _can_be_captured(step._optimizer._optimizer):
        step._optimizer._capture = capture
    return capture
