"""Fails where a CUDA kernel keeps variables in local memory: spilled registers, or arrays that are indexed at run time.

    python tools/check_ptxas.py --compile csrc/cuda/activations.cu --arch 80 --arch 90a      # compiles for each
    cmake --build build/cuda 2>&1 | python tools/check_ptxas.py -                            # reads what ptxas -v said

ptxas says it under ``-Xptxas -v`` for each kernel and architecture. With ``--sass FOLDER`` (that of cuobjdump), compiled
kernels whose names match ``--expect PATTERN=INSTRUCTION`` must contain that instruction, such as HGMMA or STG.E.128.
Exits with 1 where a check fails, and with 2 where there was nothing to check.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>sm_\w+)'")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# Warning C7508 and its kin: setmaxnreg was ignored, so a warp-specialised kernel runs with the wrong registers.
_IGNORED = re.compile(r"setmaxnreg.*ignored", re.IGNORECASE)


@dataclass
class Kernel:
    """What ptxas said about one kernel on one architecture; sizes in bytes a thread."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0

    @property
    def is_clean(self) -> bool:
        return self.stack == 0 and self.spills == 0


def parse(log: str) -> list[Kernel]:
    """The kernels of a log of ``ptxas -v``."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernels.append(Kernel(entry["name"], entry["arch"]))
        elif kernels and (local := _LOCAL.search(line)):
            kernels[-1].stack = int(local[1])
            kernels[-1].spills = int(local[2]) + int(local[3])
        elif kernels and (registers := _REGISTERS.search(line)):
            kernels[-1].registers = int(registers[1])
    return kernels


def ignored_warnings(log: str) -> list[str]:
    return [line for line in log.splitlines() if _IGNORED.search(line)]


def compile_source(source: Path, arch: str, includes: Sequence[str], defines: Sequence[str], cubin: Path) -> str:
    """Compiles one source for one architecture and returns what ptxas said.

    Raises:
        RuntimeError: with the compiler's messages, if it fails.
    """
    command = ["nvcc", "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", *(f"-D{each}" for each in defines)]
    command += [*(f"-I{each}" for each in includes), str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source} does not compile for sm_{arch}:\n{result.stderr}")
    return result.stdout + result.stderr


def readable(names: Sequence[str]) -> list[str]:
    """C++ names without their parameters, where a demangler is installed."""
    if shutil.which("c++filt") is None:
        return list(names)
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [_without_parameters(line) for line in result.stdout.splitlines()]


def _without_parameters(name: str) -> str:
    """Cut at the parenthesis that opens the parameters: the first outside of angle brackets and not "(anonymous"."""
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            return name[:i]
    return name


def instructions(cubin: Path, folder: Path) -> dict[str, str]:
    """SASS of each kernel in a cubin."""
    command = [str(folder / "cuobjdump"), "--dump-sass", str(cubin)]
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    return dict(zip(parts[1::2], parts[2::2]))


def missing(sass: dict[str, str], expectations: Sequence[str]) -> Iterator[str]:
    """For each PATTERN=INSTRUCTION, the kernels that match and lack the instruction."""
    for expectation in expectations:
        pattern, _, instruction = expectation.partition("=")
        for name, text in sass.items():
            if re.search(pattern, name) and instruction not in text:
                yield f"{readable([name])[0]} has no {instruction}"


def report(kernels: Sequence[Kernel]) -> None:
    for kernel, name in zip(kernels, readable([each.name for each in kernels])):
        mark = "" if kernel.is_clean else "   <- local memory"
        sizes = f"{kernel.registers:3d} registers, {kernel.stack:4d} stack, {kernel.spills:4d} spilled"
        print(f"{kernel.arch:8s} {sizes}  {name[:160]}{mark}")


def _arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="*", help="logs of ptxas -v, or - for standard input")
    parser.add_argument("--compile", nargs="+", type=Path, default=[], metavar="SOURCE", help="sources to compile")
    parser.add_argument("--arch", action="append", default=[], help="architecture to compile for, such as 80 or 90a")
    parser.add_argument("--include", action="append", default=[], help="include folder of the compilation")
    parser.add_argument("--define", action="append", default=[], help="macro of the compilation")
    parser.add_argument("--sass", type=Path, metavar="FOLDER", help="folder of cuobjdump and nvdisasm")
    parser.add_argument("--expect", action="append", default=[], metavar="PATTERN=INSTRUCTION", help="see above")
    arguments = parser.parse_args(argv)
    if arguments.compile and not arguments.arch:
        parser.error("--compile needs at least one --arch")
    if arguments.expect and not arguments.sass:
        parser.error("--expect needs --sass")
    return arguments


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = _arguments(argv)
    logs = [sys.stdin.read() if name == "-" else Path(name).read_text() for name in arguments.logs]
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        for source in arguments.compile:
            for arch in arguments.arch:
                try:
                    logs.append(compile_source(source, arch, arguments.include, arguments.define, cubin))
                except (RuntimeError, FileNotFoundError) as error:
                    print(error, file=sys.stderr)
                    return 1
                if arguments.sass:
                    problems += missing(instructions(cubin, arguments.sass), arguments.expect)
    kernels = [kernel for log in logs for kernel in parse(log)]
    report(kernels)
    if not kernels:
        print("no kernels: was ptxas run with -v?", file=sys.stderr)
        return 2
    problems += [f"{kernel.arch}: {kernel.name} uses local memory" for kernel in kernels if not kernel.is_clean]
    problems += [line for log in logs for line in ignored_warnings(log)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
