"""From recorded launches to machine code, and what it costs: registers, spills, shared memory."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.sizes import SIZES
from hubert_fast.kernels.launch import Launch, options, recording

# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Job(NamedTuple):
    operator: str
    size: str
    dtype: str
    arch: int


class Compiled(NamedTuple):
    """What became of one kernel."""

    job: Job
    kernel: str
    variant: str  # constants that tell it from the operator's others
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a program
    serialized: bool  # whether Hopper's matrix instructions wait for one another

    @property
    def problem(self) -> str:
        if self.spilled:
            return f"{self.spilled} bytes a thread spilled"
        if self.serialized:
            return "wgmma instructions are serialized"
        if self.shared > SHARED_BYTES[self.job.arch]:
            return f"{self.shared} bytes of shared memory; sm_{self.job.arch} has {SHARED_BYTES[self.job.arch]}"
        return ""


def run(job: Job, keep: Optional[Path] = None) -> list[Compiled]:
    """Compile what ``job``'s operator launches."""
    module = importlib.import_module(f"tools.aot.{job.operator}")
    with recording(job.arch) as launches:
        module.launches(SIZES[job.size], getattr(torch, job.dtype))
    if not launches:
        raise SystemExit(f"tools/aot/{job.operator}.py launched nothing")
    return list(compile_all(job, launches, keep))


def compile_all(job: Job, launches: list[Launch], keep: Optional[Path] = None) -> Iterator[Compiled]:
    seen = set()
    for each in launches:
        signature, constants, attributes = specialise(each)
        key = (each.kernel.__name__, str(signature), str(constants), str(attributes), str(each.blocks))
        if key in seen:
            continue
        seen.add(key)
        source = ASTSource(each.kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", each.architecture, 32), options=options(each.blocks))
        registers, spilled = resources(kernel.asm["cubin"])
        variant = ", ".join(f"{name[0]}={value}" for name, value in _by_name(each, constants) if value is not None)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            stem = f"{job.operator}-{job.size}-{job.dtype}-sm{job.arch}-{each.kernel.__name__}-{len(seen)}"
            (keep / f"{stem}.ptx").write_text(kernel.asm["ptx"])
            (keep / f"{stem}.cubin").write_bytes(kernel.asm["cubin"])
        serialized = is_serialized(kernel.asm["ptx"], each.architecture)
        yield Compiled(job, each.kernel.__name__, variant, registers, spilled, kernel.metadata.shared, serialized)


def _by_name(launch: Launch, constants: dict) -> Iterator[tuple[tuple[str], Any]]:
    for (index,), value in constants.items():
        yield (launch.kernel.arg_names[index],), value


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """(signature, constants, attributes) as Triton's own launcher would derive them from the arguments."""
    given = {**launch.arguments, **launch.blocks.sizes}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = given.pop(parameter.name)
        kind = "constexpr" if parameter.is_constexpr or value is None else _kind(value)
        plain = parameter.do_not_specialize
        if kind != "constexpr" and not isinstance(value, (torch.Tensor, float)) and value == 1 and not plain:
            kind = "constexpr"
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif not plain and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    if given:
        raise ValueError(f"{launch.kernel.__name__} has no parameters {sorted(given)}")
    return signature, constants, attributes


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel cannot take {value!r}")


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
