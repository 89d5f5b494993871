"""The rules of a CUDA stream capture, kept on a CPU, with every operator on its GPU kernels, none of which is started.

Fake CUDA tensors would do it better, but autograd refuses them where torch is built without CUDA. So memory of the "device" is
told from that of the host by who made it: parameters, the optimizer's state and what `GraphedStep` holds, and what operations in
a capture make on a device that they were told.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubert_fast import cpu
from hubert_fast.models import plain
from hubert_fast.ops import triton_backend
from hubert_fast.ops.operator import Operator

_KERNELS = (
    "masked_attention", "residual_layer_norm", "bias_gelu_dropout", "bias_dropout_residual", "mask_fill", "positional_conv",
    "cosine_cross_entropy",
)  # fmt: skip
_ARCHITECTURE = 90
_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ForbiddenInCaptureError(Exception):
    """An operation that a capture refuses, or whose result a graph would have as a constant."""


class _Rules(TorchDispatchMode):
    def __init__(self, on_device: dict[int, Tensor]) -> None:
        super().__init__()
        self.on_device = on_device  # by the address of the memory; kept, so that it stays theirs

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        given = [each for each in tree_leaves((arguments, named)) if isinstance(each, Tensor)]
        if _WAITS & set(function.tags) and not _takes_by_numbers(function, arguments):
            raise ForbiddenInCaptureError(f"{function} waits for the device")
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise ForbiddenInCaptureError(f"{function} draws from the default generator")
        if any(each.untyped_storage().data_ptr() not in self.on_device for each in given if each.numel()):
            raise ForbiddenInCaptureError(f"{function} reads memory of the host")
        result = function(*arguments, **named)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.on_device.update((each.untyped_storage().data_ptr(), each) for each in made)
        return result


class _DevicesAreNamed(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function in _device_constructors() and named.get("device") is None:
            raise ForbiddenInCaptureError(f"{function.__name__} makes a tensor on the host")
        return function(*arguments, **named)


def _takes_by_numbers(function: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether it is x[index] with integers: with booleans the shape depends on their values."""
    return function is torch.ops.aten.index.Tensor and all(
        each is None or each.dtype != torch.bool for each in arguments[1]
    )


class CaptureByTheRules:
    """In place of `hubert_fast.models.capture.CudaCapture`: what is captured must keep the rules."""

    def __init__(self, step: Any) -> None:
        self.graphs = 0
        self._step = step
        self._on_device: dict[int, Tensor] = {}
        step._capture = step._optimizer._capture = self

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        yield

    def renew(self) -> None:
        self._on_device.clear()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        for each in _tensors_of(self._step):
            self._on_device[each.untyped_storage().data_ptr()] = each
        with contextlib.ExitStack() as stack:
            for owner, name in ((torch.cuda, "synchronize"), (torch.cuda, "Stream"), (torch.cuda, "Event")):
                stack.enter_context(mock.patch.object(owner, name, _refuse(name)))
            for name in ("cpu", "pin_memory", "numpy"):
                stack.enter_context(mock.patch.object(Tensor, name, _refuse(name)))
            stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
            stack.enter_context(_DevicesAreNamed())
            stack.enter_context(_Rules(self._on_device))
            work()
        self.graphs += 1
        return lambda: None


def _refuse(name: str) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise ForbiddenInCaptureError(f"{name} in a capture")

    return call


def _tensors_of(step: Any) -> Iterator[Tensor]:
    """Tensors that outlast a capture: of the model, of the optimizer, and those that a `GraphedStep` holds."""
    optimizer = step._optimizer
    yield from step._objective.parameters()
    yield from (each for each in tree_leaves([*optimizer._optimizer.state.values()]) if isinstance(each, Tensor))
    yield from (optimizer.norm, *optimizer._rates, *step._gradients.flat)
    yield from (step._sums, step._weights, step._scale, step._seeds, step._rows)
    yield from (program.memory for program in step._programs.values())


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Inside it CPU tensors take the kernels of an H100; they leave their results as they find them."""
    for name in _KERNELS:
        importlib.import_module(f"hubert_fast.kernels.{name}")
    with contextlib.ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        def stream_dtype(x: Tensor) -> Optional[torch.dtype]:
            return torch.float32 if torch.is_autocast_enabled("cpu") else None

        for module in [each for name, each in sys.modules.items() if name.startswith("hubert_fast.kernels.")]:
            for name, value in (("architecture", lambda _: _ARCHITECTURE), ("launch", lambda *_: None)):
                if callable(getattr(module, name, None)):
                    replace(module, name, value)
        replace(triton_backend, "objection", lambda *_: None)
        replace(cpu, "is_cpu", lambda device: False)
        replace(plain, "stream_dtype", stream_dtype)
        replace(Operator, "must_be_seen", lambda *_: False)  # what implements it is to be looked at
        yield
