"""Launches and host time of a training step on a GPU, measured on a CPU.

    python -m benchmarks.host                       as many layers as HuBERT Base has, all narrow
    python -m benchmarks.host --layers 2 --rounds 1
    python -m benchmarks.host --work update         an update of `hubert_fast.GraphedStep`, optimizer included
    python -m benchmarks.host --work extraction     units of 300 seconds of audio, as `hubert_fast.pretrain` makes them
    python -m benchmarks.host --work launches       every launch of an update of Base at its full width, graphs' included

The model trains on a CPU with every operator on its GPU kernels: Triton's launcher runs as it does on a GPU, over a driver
that counts launches and runs nothing (nothing.c); the calls of the CUDA extension are counted and dropped. Sizes are so small
that what PyTorch computes on the CPU takes little time beside the calls. The kernels write nothing, so the loss and the
gradients mean nothing. A graph is captured by running what it would hold, and its launch is a call that does nothing. The
first run compiles the kernels, which takes half a minute; Triton's cache keeps them.

Not counted are copies to the device, memsets, and second launches inside one call of a library or of the extension. Counted
with an eager step are the operations of its plan, which stay on the host: 90 of PyTorch's with this batch. Launches do not
depend on the machine; the milliseconds are those of one thread of this one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch

import hubert_fast
from hubert_fast import backend, cpu, extension, weights
from hubert_fast.cuda_backend import conv_frontend as cuda_backend
from hubert_fast.cuda_backend import device
from hubert_fast.models import plain
from hubert_fast.ops import triton_backend

from . import multi_tensor
from .architecture import Architecture

_CLASSES, _FRAMES, _BATCH = 500, 12, 2
# Operations that touch no memory of a GPU; the last two are LayerDrop's draws on the CPU.
_WITHOUT_KERNEL = {
    "as_strided", "empty", "empty_strided", "view", "_unsafe_view", "_reshape_alias", "alias", "detach", "to", "promote_types",
    "result_type", "set_", "resize_", "unbind", "uniform_", "_local_scalar_dense", "lift_fresh", "detach_",
}  # fmt: skip
# A CPU makes these of several operations, a GPU of one.
_ONE_KERNEL = {
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "sum", "mean", "linalg_vector_norm", "index_copy_", "stack")
}
_PARTS = {
    "step": ("forward", "backward"), "update": ("update",), "extraction": ("audio", "calls"), "launches": (),
}  # fmt: skip
_LISTS = "lists of tensors"
_WARM_UP = 3  # steps; of a graph the second captures
_KERNELS = (
    "masked_attention", "residual_layer_norm", "bias_gelu_dropout", "bias_dropout_residual", "mask_fill", "positional_conv",
    "cosine_cross_entropy",
)  # fmt: skip


class Host(NamedTuple):
    """Counts and times of a training step on the host."""

    triton_launches: int
    extension_calls: int
    torch_operations: int  # ATen operations that call no other; one over a list of tensors is one, as it is on a GPU
    torch_kernels: int  # of these, the ones that would launch a kernel or a copy on a GPU
    graph_launches: int
    milliseconds: list[tuple[float, ...]]  # of the parts of the work (`_PARTS`)
    by_operation: Counter[str]  # those of PyTorch's kernels

    @property
    def launches(self) -> int:
        """All kernels, whoever launches them; a call of the extension counts as one, as nearly all of them are."""
        return self.triton_launches + self.extension_calls + self.torch_kernels


class _Extension:
    """In place of ``hubert_fast._C.cuda``: counts the calls and makes none."""

    MOMENT_FRAMES, GROUP_NORM_BACKWARD_FRAMES, LAYER_NORM_BACKWARD_FRAMES = 256, 128, 128

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def tensor_core_products_available(self, dtype: int) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **named: Any) -> None:
            for each in named.values():
                getattr(each, "data_ptr", int)()  # as the extension does
            if name[0].islower():  # a class is a record of arguments
                self.calls[name] += 1

        return call


def build_driver(folder: Path) -> Path:
    """Compile nothing.c into ``folder``.

    Raises:
        RuntimeError: where there is no C compiler, or it fails.
    """
    import triton

    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_name("nothing.c")
    command = [*compiler, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += [f"-I{include}", str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"benchmarks.host needs a C compiler; {compiler[0]!r} is none (CC names another)") from None
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return library


@contextlib.contextmanager
def _as_on_a_gpu(driver: Path) -> Iterator[tuple[ctypes.CDLL, _Extension]]:
    """Inside it CPU tensors take the kernels of an H100; yields what counts the launches and the calls of the extension."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(driver.parent)  # read when Triton first asks for the driver
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from hubert_fast.kernels import launch

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def stream_dtype(x: torch.Tensor) -> Optional[torch.dtype]:
        return torch.float32 if torch.is_autocast_enabled("cpu") else None

    def wide_product(left: torch.Tensor, right: torch.Tensor, memory: Optional[torch.Tensor]) -> torch.Tensor:
        """One kernel, as a GPU's product of 16 bits that gives float32; a CPU has none."""
        if memory is None:
            return torch.zeros(len(left), right.shape[1])
        return memory.zero_()

    for name in _KERNELS:
        triton_backend.objection(name, torch.empty(0))  # imports what the following replaces
        __import__(f"hubert_fast.kernels.{name}")
    library, calls = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL), _Extension()
    library.nothing_launches.restype = ctypes.c_long
    triton.runtime.driver.set_active(Driver())
    with contextlib.ExitStack() as stack:

        def replace(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        for module in [each for name, each in sys.modules.items() if name.startswith("hubert_fast.kernels.")]:
            if hasattr(module, "architecture"):
                replace(module, "architecture", lambda tensor: 90)
        replace(launch, "why_not", lambda tensor, automatic: None)
        replace(triton_backend, "objection", lambda operator, *tensors: None)
        replace(cpu, "is_cpu", lambda device: False)
        replace(plain, "stream_dtype", stream_dtype)
        replace(weights, "_has_wide_product", lambda x: True)
        replace(weights, "_wide_product", wide_product)
        replace(cuda_backend, "objection", lambda *arguments: None)  # layers are too narrow for it
        replace(device, "objection", lambda *arguments: None)
        replace(extension, "cuda", lambda: calls)
        for entry in backend._operators.values():
            replace(entry, "unavailable", {})
        yield library, calls


class _Capture:
    """In place of `hubert_fast.models.capture.CudaCapture`: counts launches of graphs and makes none."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.launches, self._library = 0, library

    def ahead(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def launch() -> None:
            self.launches += 1
            self._library.nothing_launches()

        return launch


def measure(layers: int, rounds: int, driver: Path, *, work: str = "step", layer_drop: float = 0.0) -> Host:
    """Counts and times of ``work``: after a warm-up one call is counted and ``rounds`` are timed.

    "step" is a forward and a backward of `PretrainingObjective`, "update" a `GraphedStep`, "extraction" a call of `ModelLayers`,
    "launches" what a `GraphedStep` of HuBERT Base runs in its graphs and outside, not timed.
    """
    with _as_on_a_gpu(driver) as (library, calls):
        capture = _Capture(library)
        objective = _objective(layers, layer_drop, full_width=work == "launches")
        make = {"step": _step, "update": _update, "extraction": _extraction, "launches": _update}[work]
        step = make(objective, None if work == "launches" else capture)  # uncaptured, every launch is the host's
        for _ in range(_WARM_UP):
            step()
        before, launched = library.nothing_launches(), capture.launches
        calls.calls.clear()
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # as in stages.py
        with (
            multi_tensor.counted(_LISTS) as of_lists,
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        ):
            step()
        operations = Counter(_operations(profiler.events()))
        kernels = Counter({name: count for name, count in operations.items() if name not in _WITHOUT_KERNEL})
        kernels[_LISTS] = sum(of_lists)
        counts = library.nothing_launches() - before, sum(calls.calls.values()), operations.total(), kernels.total()
        counts += (capture.launches - launched,)
        times = [step() for _ in range(rounds)] if _PARTS[work] else []
    return Host(*counts, list(zip(*times)), kernels)


def _operations(events: Iterable[Any]) -> Iterator[str]:
    """ATen operations that call no other; those on lists of tensors are counted apart (multi_tensor.py)."""
    for event in events:
        if not event.name.startswith("aten::") or (event.name not in _ONE_KERNEL and _calls_another(event)):
            continue
        above = event.cpu_parent
        while above is not None and above.name not in (_LISTS, *_ONE_KERNEL):
            above = above.cpu_parent
        if above is None:
            yield event.name.removeprefix("aten::")


def _calls_another(event: Any) -> bool:
    return any(each.name.startswith("aten::") for each in event.cpu_children)


def _objective(layers: int, layer_drop: float, *, full_width: bool = False) -> hubert_fast.PretrainingObjective:
    torch.manual_seed(0)
    if full_width:
        architecture = Architecture(layers=layers)
    else:
        convolutions = tuple((32, *rest) for _, *rest in Architecture().convolutions)
        architecture = Architecture(
            "small", convolutions=convolutions, dim=32, layers=layers, heads=2, ffn=64, final_dim=32
        )
    arguments = {**architecture.factory_arguments(_CLASSES), "encoder_layer_drop": layer_drop}
    model = hubert_fast.hubert_pretrain_model(**arguments).train()
    return hubert_fast.PretrainingObjective(model)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    samples = 400 + 320 * (_FRAMES - 1)
    labels = torch.randint(0, _CLASSES, (_BATCH, _FRAMES))
    return torch.randn(_BATCH, samples), labels, torch.tensor([samples, samples - 320])


def _step(objective: hubert_fast.PretrainingObjective, _: _Capture) -> Callable[[], tuple[float, ...]]:
    """A function that does one step and returns the milliseconds of its forward and of its backward."""
    batch = _batch()

    def step() -> tuple[float, float]:
        objective.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            output = objective(*batch)
        loss = output.mean
        between = time.perf_counter()
        loss.backward()
        return 1e3 * (between - started), 1e3 * (time.perf_counter() - between)

    return step


def _update(
    objective: hubert_fast.PretrainingObjective, capture: Optional[_Capture]
) -> Callable[[], tuple[float, ...]]:
    """A function that does one update in graphs and returns its milliseconds; plans are made ahead, as by a data loader."""
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-4, fused=True)
    room = hubert_fast.Capacities(rows=_BATCH * _FRAMES, sequences=_BATCH, max_frames=_FRAMES)
    step = hubert_fast.GraphedStep(objective, optimizer, clip_norm=10.0, capacities=room, autocast=torch.bfloat16)
    step._capture = step._optimizer._capture = capture
    batch = step.planner(*_batch())

    def update() -> tuple[float]:
        started = time.perf_counter()
        step([batch])
        return (1e3 * (time.perf_counter() - started),)

    return update


def _extraction(objective: hubert_fast.PretrainingObjective, capture: _Capture) -> Callable[[], tuple[float, ...]]:
    """A function that makes units of one layer, of 30 utterances of 10 s in one call, and returns its milliseconds: to write the
    audio into one tensor, which on a GPU is page-locked and kept from call to call, and all else.
    """
    import numpy as np

    from hubert_fast.pretrain import features
    from hubert_fast.pretrain.codebook import Codebook

    with mock.patch.object(features, "load_model", lambda weights: objective.model.eval()):
        layers = features.ModelLayers(Path(), autocast=True)
    layers._capture, layers.call_seconds = capture, 300.0
    waveforms = [np.random.default_rng(i).standard_normal(160_000).astype(np.float32) for i in range(30)]
    depth, dim = len(objective.model.wav2vec2.encoder.transformer.layers), 32
    codebooks = {(depth + 1) // 2: Codebook(np.zeros((_CLASSES, dim), dtype=np.float32))}

    padded_audio = features.padded_audio

    def extract() -> tuple[float, float]:
        spent = 0.0

        def padded(*arguments: Any, **named: Any) -> torch.Tensor:
            nonlocal spent
            started = time.perf_counter()
            audio = padded_audio(*arguments, **named)
            spent += time.perf_counter() - started
            return audio

        started = time.perf_counter()
        with mock.patch.object(features, "padded_audio", padded):
            layers._assign_on_device(waveforms, codebooks, min(codebooks), max(codebooks))
        return 1e3 * spent, 1e3 * (time.perf_counter() - started - spent)

    return extract


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (default: 12)")
    parser.add_argument("--rounds", type=int, default=15, help="calls that are timed (default: 15)")
    work = "step: a forward and a backward; update: GraphedStep, optimizer included; extraction: units; launches: those of a "
    work += "whole update of Base, not timed (default: step)"
    parser.add_argument("--work", choices=_PARTS, default="step", help=work)
    parser.add_argument("--layer-drop", type=float, default=0.0, help="LayerDrop's probability, in [0, 1] (default: 0)")
    parsed = parser.parse_args(arguments)
    if min(parsed.layers, parsed.rounds) < 1:
        parser.error(f"--layers and --rounds must be at least 1; got {parsed.layers} and {parsed.rounds}")
    reason = triton_backend.why_not()
    if reason is not None or os.environ.get("TRITON_INTERPRET") == "1":
        print(f"benchmarks.host: {reason or 'TRITON_INTERPRET is set'}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            host = measure(
                parsed.layers,
                parsed.rounds,
                build_driver(Path(folder)),
                work=parsed.work,
                layer_drop=parsed.layer_drop,
            )
        except RuntimeError as error:
            print(f"benchmarks.host: {error}", file=sys.stderr)
            return 1
    print(
        f"{host.triton_launches} launches of Triton's kernels, {host.extension_calls} calls of the extension,", end=" "
    )
    print(f"{host.torch_operations} operations of PyTorch ({host.torch_kernels} kernels),", end=" ")
    print(f"{host.graph_launches} launches of graphs")
    if parsed.work == "launches":
        print(f"{host.launches} launches in all; PyTorch's:", end=" ")
        print(", ".join(f"{count} {name}" for name, count in host.by_operation.most_common()))
    for name, times in zip(_PARTS[parsed.work], host.milliseconds):
        print(f"{name}: median {statistics.median(times):.2f} ms, least {min(times):.2f} ms of {len(times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
