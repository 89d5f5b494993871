"""What setup.py decides before it calls CMake: the settings in the environment, the compilers, how many jobs.

    HUBERT_FAST_BUILD       1 (default); 0: a pure-Python package, which needs no compiler
    HUBERT_FAST_CUDA        auto (default): CUDA kernels where a usable nvcc is found; 1: an error where not; 0: none
    HUBERT_FAST_CUDA_ARCHS  architectures of the CUDA kernels, default 80;90a; newer GPUs get PTX
    HUBERT_FAST_JOBS        compilers at a time, default one a core
    CXX, CUDACXX, CUDA_HOME, CUDAHOSTCXX    which compilers, as CMake reads them

Standard library only; nothing here prints or changes anything.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

DEFAULT_ARCHS = "80;90a"
OLDEST_NVCC = (12, 4)
GIGABYTES_FOR_NVCC = 3
DEFAULT_TOOLKIT = "/usr/local/cuda"
NO_NVCC = f"nvcc was not found (CUDACXX, CUDA_HOME, PATH, {DEFAULT_TOOLKIT})"
CUTLASS_REQUIREMENT = "nvidia-cutlass==4.2.*"
WITHOUT_COMPILER = "HUBERT_FAST_BUILD=0 installs the pure-Python package, which needs no compiler"


class BuildError(Exception):
    """The build cannot go on; the message is one sentence for the person who started it."""


@dataclass(frozen=True)
class Options:
    """The HUBERT_FAST_* variables."""

    extension: bool
    cuda: Optional[bool]  # None: where nvcc is found
    cuda_archs: tuple[str, ...]
    jobs: int


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]


def read_options(environment: Mapping[str, str]) -> Options:
    """Raises: BuildError for a value that is not accepted."""
    return Options(
        extension=_choice(environment, "HUBERT_FAST_BUILD", {"": True, "1": True, "0": False}),
        cuda=_choice(environment, "HUBERT_FAST_CUDA", {"": None, "auto": None, "1": True, "0": False}),
        cuda_archs=_archs(environment.get("HUBERT_FAST_CUDA_ARCHS") or DEFAULT_ARCHS),
        jobs=_jobs(environment.get("HUBERT_FAST_JOBS") or str(available_cores())),
    )


def _choice(environment: Mapping[str, str], name: str, accepted: dict[str, Optional[bool]]) -> Optional[bool]:
    value = environment.get(name, "").strip()
    if value not in accepted:
        raise BuildError(f"{name} is {value!r}; accepted are {', '.join(each for each in accepted if each)} or unset")
    return accepted[value]


def _archs(value: str) -> tuple[str, ...]:
    archs = [arch for arch in re.split(r"[;,\s]+", value) if arch]
    good = [arch for arch in archs if re.fullmatch(r"(\d\d|1\d\d)[af]?", arch) and int(arch.rstrip("af")) >= 80]
    if not archs or good != archs:
        raise BuildError(
            f"HUBERT_FAST_CUDA_ARCHS is {value!r}; accepted are numbers from 80 on, with an optional suffix a or f, with "
            f"';' between them, such as {DEFAULT_ARCHS}"
        )
    return tuple(dict.fromkeys(archs))


def _jobs(value: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", value.strip()):
        raise BuildError(f"HUBERT_FAST_JOBS is {value!r}; accepted are whole numbers from 1 to 9999")
    return int(value)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nvcc_jobs(jobs: int, memory: Optional[int]) -> int:
    """How many of ``jobs`` may be nvcc's in ``memory`` bytes (None: unknown)."""
    if memory is None:
        return jobs
    return max(1, min(jobs, memory // (GIGABYTES_FOR_NVCC << 30)))


def available_memory() -> Optional[int]:
    """Bytes that programs may still take, as far as Linux tells; None elsewhere."""
    available = None
    try:
        available = (
            int(re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) << 10
        )
        # A container's limit may be smaller than the machine.
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, TypeError):
        pass
    return available


def find_cxx(environment: Mapping[str, str]) -> list[str]:
    """The command of the C++ compiler, which is known to run and to be new enough.

    Raises: BuildError
    """
    named = environment.get("CXX", "").strip()
    commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    command = next((c for c in commands if shutil.which(c[0], path=environment.get("PATH"))), None)
    if command is None:
        looked_for = (
            f"there is no {named!r}, which CXX names" if named else "no C++ compiler was found (c++, g++, clang++)"
        )
        raise BuildError(f"{looked_for}; install g++ or clang++, or {WITHOUT_COMPILER}")
    flags, source = [], "#include <string_view>\nint main() {}\n"
    if platform.machine() in ("x86_64", "AMD64"):
        # The newest instruction set that kernels are compiled for.
        flags, source = (
            ["-mavx512bf16"],
            '#include <string_view>\nint main() { return __builtin_cpu_supports("avx512bf16"); }\n',
        )
    failure = _compile([*command, "-std=c++17", *flags], "try.cpp", source, environment)
    if failure is not None:
        raise BuildError(
            f"the C++ compiler {shlex.join(command)} will not do: {failure}; install a newer one and name it in CXX, or "
            f"{WITHOUT_COMPILER}"
        )
    return command


def find_nvcc(environment: Mapping[str, str]) -> Optional[Nvcc]:
    """CUDA's compiler, or None where there is none.

    Raises: BuildError for one that is named and missing, does not run, or is too old.
    """
    path = _nvcc_path(environment)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{path} does not run: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release is None:
        raise BuildError(f"{path} --version names no release")
    version = (int(release[1]), int(release[2]))
    if version < OLDEST_NVCC:
        raise BuildError(
            f"{path} is of CUDA {version[0]}.{version[1]}; {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} is the oldest that can be used"
        )
    return Nvcc(path, version)


def _nvcc_path(environment: Mapping[str, str]) -> Optional[Path]:
    search = environment.get("PATH")
    if environment.get("CUDACXX"):
        found = shutil.which(environment["CUDACXX"], path=search)
        if found is None:
            raise BuildError(f"there is no {environment['CUDACXX']!r}, which CUDACXX names")
        return Path(found)
    if environment.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=str(Path(environment["CUDA_HOME"], "bin")))
        if found is None:
            raise BuildError(f"there is no bin/nvcc in {environment['CUDA_HOME']!r}, which CUDA_HOME names")
        return Path(found)
    found = shutil.which("nvcc", path=search) or shutil.which("nvcc", path=f"{DEFAULT_TOOLKIT}/bin")
    return None if found is None else Path(found)


def cuda_host_compiler(cxx: list[str], environment: Mapping[str, str]) -> str:
    """The C++ compiler that nvcc calls: the one for everything else, less a launcher such as ccache before it."""
    if environment.get("CUDAHOSTCXX"):
        return environment["CUDAHOSTCXX"]
    return next((word for word in reversed(cxx) if not word.startswith("-")), cxx[0])


def check_nvcc(nvcc: Nvcc, host_compiler: str, archs: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """That nvcc takes this C++ compiler and these architectures. Raises: BuildError"""
    code = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    command = [str(nvcc.path), "-std=c++17", "-ccbin", host_compiler, *code]
    failure = _compile(command, "try.cu", "#include <cuda_bf16.h>\n__global__ void kernel() {}\n", environment)
    if failure is not None:
        raise BuildError(
            f"{nvcc.path} with the C++ compiler {host_compiler} cannot compile for {';'.join(archs)}: {failure}"
        )


def find_cutlass() -> tuple[Path, str]:
    """(the folder that holds cutlass/cutlass.h, version) of the installed nvidia-cutlass, which is not imported.

    Raises: BuildError
    """
    spec = find_spec("cutlass_library")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        include = Path(folder, "source", "include")
        header = include / "cutlass" / "version.h"
        if header.is_file():
            text = header.read_text()
            return include, ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))
    raise BuildError(f"the CUTLASS headers were not found: pip install '{CUTLASS_REQUIREMENT}'")


def _compile(command: list[str], name: str, source: str, environment: Mapping[str, str]) -> Optional[str]:
    """None if ``command -c`` compiles ``source``, else the compiler's first complaint."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_text(source)
        try:
            done = subprocess.run(
                [*command, "-c", name, "-o", "try.o"], cwd=folder, env=dict(environment), capture_output=True, text=True
            )
        except OSError as error:
            return str(error)
        if done.returncode == 0 and Path(folder, "try.o").exists():
            return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    complaints = [line for line in lines if "error" in line.lower()]
    return (complaints or lines or [f"exit status {done.returncode}"])[0]
