"""From recorded launches to machine code, and what it costs: registers, spills, shared memory."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.backends.nvidia.driver import CudaLauncher

from benchmarks.sizes import SIZES
from hubert_fast import tf32
from hubert_fast.kernels.launch import Launch, recording
from tools.aot.launches import launch_all

# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}

# tf32 is float32 where PyTorch's switches allow TensorFloat-32.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Job(NamedTuple):
    operator: str
    size: str
    dtype: str  # of DTYPES
    arch: int


class Compiled(NamedTuple):
    """What became of one kernel."""

    job: Job
    kernel: str
    variant: str  # constants that tell it from the operator's others
    error: str  # why it does not compile, or nothing
    registers: int = 0
    spilled: int = 0  # bytes of local memory a thread
    shared: int = 0  # bytes a program
    serialized: bool = False  # whether Hopper's matrix instructions wait for one another

    @property
    def cannot_run(self) -> str:
        """Why, or nothing."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.shared > SHARED_BYTES[self.job.arch]:
            return f"{self.shared} bytes of shared memory; sm_{self.job.arch} has {SHARED_BYTES[self.job.arch]}"
        return ""

    @property
    def problem(self) -> str:
        """Why it cannot run, or what makes it slow; nothing where all is well."""
        if self.spilled and not self.cannot_run:
            return f"{self.spilled} bytes a thread spilled"
        return self.cannot_run or ("wgmma instructions are serialized" if self.serialized else "")


class _NoGpu:
    """What Triton's launcher asks of a driver before it compiles. It keeps kernels by device: each architecture is one."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def launches_of(job: Job) -> list[Launch]:
    """What ``job``'s operator launches."""
    with recording(job.arch) as launches, tf32.allowed(job.dtype == "tf32"):
        launch_all(job.operator, SIZES[job.size], DTYPES[job.dtype])
    if not launches:
        raise SystemExit(f"{job.operator} launched nothing")
    return launches


def run(job: Job, number: int, keep: Optional[Path] = None) -> Compiled:
    """What becomes of the launch ``number`` of ``job``."""
    return compiled(job, launches_of(job)[number], keep)


def fill_cache(job: Job, number: int) -> Compiled:
    """`run`, but nothing is looked at: the launch and, where there is a driver to build it for, its launcher are compiled."""
    launch = launches_of(job)[number]
    try:
        kernel = _warm_up(launch)
    except Exception as error:
        return _failed(job, launch, error)
    # Triton has the host's compiler make a launcher for each signature, at the first launch. Without libcuda it cannot; then
    # there will be no launch either.
    with suppress(Exception):
        CudaLauncher(kernel.src, kernel.metadata)
    return Compiled(job, launch.kernel.__name__, "", "", shared=kernel.metadata.shared)


def _failed(job: Job, launch: Launch, error: Exception) -> Compiled:
    lines = str(error).strip().splitlines() or [""]
    return Compiled(job, launch.kernel.__name__, "", error=f"{type(error).__name__}: {lines[-1]}")


def key_of(launch: Launch) -> tuple[Any, ...]:
    """By what Triton's launcher tells the machine code of ``launch`` from that of others. Compiles nothing."""
    asked = []

    def note(**details: Any) -> bool:
        asked.append(details["compile"]["key"])
        return True  # for the launcher: there is nothing to compile

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        _warm_up(launch)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return launch.architecture, launch.kernel, *asked


def _warm_up(launch: Launch) -> Any:
    """The kernel that Triton's launcher compiles for ``launch``: under the key by which it looks for it on a GPU."""
    triton.runtime.driver.set_active(_NoGpu(launch.architecture))
    settings = {**launch.arguments, **launch.blocks.sizes, **launch.blocks.options}
    return launch.kernel.run(grid=(1,), warmup=True, **settings)


def compiled(job: Job, launch: Launch, keep: Optional[Path] = None) -> Compiled:
    """What becomes of ``launch``, one of ``job``'s; its PTX and machine code go to the folder ``keep``."""
    try:
        kernel = _warm_up(launch)
    except Exception as error:  # the others are still worth compiling
        return _failed(job, launch, error)
    constants = {launch.kernel.arg_names[index]: value for (index,), value in kernel.src.constants.items()}
    variant = ", ".join(f"{name}={value}" for name, value in constants.items() if value is not None)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        stem = f"{job.operator}-{job.size}-{job.dtype}-sm{job.arch}-{launch.kernel.__name__}-{kernel.hash[:8]}"
        (keep / f"{stem}.ptx").write_text(kernel.asm["ptx"])
        (keep / f"{stem}.cubin").write_bytes(kernel.asm["cubin"])
    registers, spilled = resources(kernel.asm["cubin"])
    serialized = is_serialized(kernel.asm["ptx"], job.arch)
    return Compiled(job, launch.kernel.__name__, variant, "", registers, spilled, kernel.metadata.shared, serialized)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) a thread, from what the assembler wrote into the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return int(registers[1]), int(registers[2]) + int(registers[3])


def is_serialized(ptx: str, arch: int) -> bool:
    """Whether the assembler puts a wait after every wgmma, at half the speed. It says so in passing, and Triton does not."""
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, f"-arch=sm_{arch}a", "-v", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in done.stdout + done.stderr
