"""How every Triton kernel is started: block sizes from a table, nothing tuned at a user's first step.

A kernel's host function lists the block sizes that suit its inputs, best first; `launch` takes the first. With the environment
variable ``HUBERT_FAST_AUTOTUNE=1`` it times all of them at the first launch of each shape instead (`triton.autotune`); which one
wins may then change from run to run, and with it the last bits of a sum.

Kernels run on a GPU, or on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1`` in the environment before this is
imported), which is for tests. `recording` runs nothing: it notes what would be started, so that tools/aot can compile it without
a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, ContextManager, Optional

import torch
import triton
from torch import Tensor

# Architectures that the tables tell apart. 86 stands for all with 100 KB of shared memory (8.6, 8.9, 12.x), 0 for the
# interpreter, whose blocks are small so that small inputs have several.
ARCHITECTURES = (80, 86, 90, 100)
INTERPRETER = 0

INTERPRETED = triton.knobs.runtime.interpret

_AUTOTUNE = os.environ.get("HUBERT_FAST_AUTOTUNE") == "1"
_HERE = nullcontext()


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a launch: constants of the kernel by name, warps of a program, stages of its pipelined loops.

    ``registers`` is the most that a thread may have, where a few more would leave room for one program less. None: as it comes.
    """

    sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    warps: int = 4
    stages: int = 2
    registers: Optional[int] = None

    @cached_property
    def options(self) -> dict[str, Any]:
        """Triton's compile options. Multiply-adds are fused whatever the default: Triton 3.10 turns it round."""
        return {
            "num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers, "enable_fp_fusion": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One that `recording` saw: all it takes to compile the kernel for its architecture."""

    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]  # by name; tensors lie on the meta device
    blocks: Blocks
    architecture: int


_recorded: Optional[list[Launch]] = None
_recorded_architecture = 0


def architecture(tensor: Tensor) -> int:
    """The column of the block tables for the device of ``tensor``: one of `ARCHITECTURES`, or `INTERPRETER`."""
    if _recorded is not None:
        return _recorded_architecture
    if tensor.device.type != "cuda":
        return INTERPRETER
    return _architecture(tensor.device.index)


@lru_cache
def _architecture(index: int) -> int:
    capability = torch.cuda.get_device_capability(index)
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return 86
    return {8: 80, 9: 90}.get(capability[0], 100)


@lru_cache
def _is_capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 8


def why_not(tensor: Tensor, *, automatic: bool) -> Optional[str]:
    """Why kernels cannot take ``tensor``, or None. ``automatic``: nobody asked for them by name."""
    if tensor.device.type == "cuda":
        return None if _is_capable(tensor.device) else "its kernels need a GPU of compute capability 8.0 or newer"
    if tensor.device.type == "meta" and _recorded is not None:
        return None
    if tensor.device.type != "cpu" or not INTERPRETED:
        return f"it runs on an NVIDIA GPU, and the inputs are on {tensor.device.type!r}"
    if automatic:
        return "on a CPU it runs in Triton's interpreter, which is for tests"
    return None


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    candidates: Sequence[Blocks],
) -> None:
    """Start ``kernel`` on the current stream.

    Args:
        kernel: a ``triton.jit`` function.
        grid: how many programs, from the arguments and block sizes by name.
        arguments: every argument that is not a block size, constants too, by name. None stands for an absent tensor.
        candidates: block sizes that suit, best first.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, dict(arguments), candidates[0], _recorded_architecture))
        return
    blocks = candidates[0]
    if _AUTOTUNE and len(candidates) > 1 and not INTERPRETED:
        with _device_of(arguments):
            _tuned(kernel, tuple(candidates), [name for name in arguments if name.isupper()])[grid](
                **arguments, enable_fp_fusion=True
            )
        return
    given = {**arguments, **blocks.sizes}
    programs = grid(given)
    if 0 in programs:
        return  # CUDA refuses an empty grid; there is nothing to do
    with _device_of(arguments):
        if INTERPRETED:
            kernel[programs](**given, **blocks.options)
        else:
            _start(kernel, programs, given, blocks)


class _Compiled:
    """The machine code of a kernel, by the arguments and options for which Triton compiles it anew."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # kept, so that its id stays its own
        self.names = kernel.arg_names
        self.are_constants = [each.is_constexpr for each in kernel.params]
        self.by_key: dict[tuple[Any, ...], Any] = {}


_compiled: dict[int, _Compiled] = {}  # by the id of the kernel: its own hash is that of its source


def _start(kernel: Any, programs: tuple[int, ...], given: Mapping[str, Any], blocks: Blocks) -> None:
    """Launch ``kernel[programs](**given, **blocks.options)``, without Triton's lookup if the same kernel was launched before.

    Triton looks a compiled kernel up by the text of its options and by what it calls specialization, of which `_kind` tells
    at least as much apart. A compiled kernel takes all arguments in order. Triton's own switches for debugging and
    instrumentation, where they are set later, are not seen by what has been launched before.
    """
    known = _compiled.get(id(kernel))
    if known is None:
        known = _compiled[id(kernel)] = _Compiled(kernel)
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    values = [given[name] for name in known.names]
    kinds = [value if is_constant else _kind(value) for value, is_constant in zip(values, known.are_constants)]
    key = (device, blocks.warps, blocks.stages, blocks.registers, *kinds)
    compiled = known.by_key.get(key)
    if compiled is None:
        known.by_key[key] = kernel[programs](**given, **blocks.options)
    else:
        compiled[(*programs, 1, 1)[:3]](*values, stream=driver.get_current_stream(device))


def _kind(value: Any) -> Any:
    """The part of an argument, which is no constant, for which Triton may compile a kernel anew."""
    kind = type(value)
    if kind is int:
        # Triton compiles anew for 1, for multiples of 16 and for each integer type.
        return value == 1, value % 16 == 0, value.bit_length() // 32, value < 0
    if kind is float or kind is bool or value is None:
        return kind
    return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which works in kernels too, takes 4 us."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is at least ``size``, which is positive."""
    return 1 << (size - 1).bit_length()


def _device_of(arguments: Mapping[str, Any]) -> ContextManager[Any]:
    """Triton starts kernels on the current device, whatever that of their arguments."""
    for each in arguments.values():
        if isinstance(each, Tensor):
            if each.is_cuda and each.device.index != torch.cuda.current_device():
                return torch.cuda.device(each.device)
            break
    return _HERE


_tuners: dict[Any, Any] = {}


def _tuned(kernel: Any, candidates: tuple[Blocks, ...], constants: list[str]) -> Any:
    """``kernel`` under ``triton.autotune``, keyed by dtypes and constants: numbers of rows change from batch to batch."""
    key = (kernel, tuple((tuple(each.sizes.items()), *each.options.values()) for each in candidates))
    if key not in _tuners:
        configs = [
            triton.Config(dict(each.sizes), num_warps=each.warps, num_stages=each.stages, maxnreg=each.registers)
            for each in candidates
        ]
        _tuners[key] = triton.autotune(configs=configs, key=constants)(kernel)
    return _tuners[key]


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Inside it launches are noted, not made, as if tensors were on a GPU of architecture ``arch``. Use meta tensors."""
    global _recorded, _recorded_architecture
    if INTERPRETED:
        raise RuntimeError(
            "kernels are interpreted in this process (TRITON_INTERPRET is set): there is nothing to compile"
        )
    before = _recorded, _recorded_architecture
    _recorded, _recorded_architecture = [], arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_architecture = before
