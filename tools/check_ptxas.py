"""Fails where a CUDA kernel keeps variables in local memory: spilled registers, or arrays that are indexed at run time.

    cmake --build build/cuda 2>&1 | python tools/check_ptxas.py - 2>&1 | c++filt    # or names of logs: setup.py keeps build.log

ptxas says it under ``-Xptxas -v`` for each kernel and architecture. Exits with 1 where a check fails, and with 2 where there was
nothing to check.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
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


def report(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        mark = "" if kernel.is_clean else "   <- local memory"
        sizes = f"{kernel.registers:3d} registers, {kernel.stack:4d} stack, {kernel.spills:4d} spilled"
        print(f"{kernel.arch:8s} {sizes}  {kernel.name}{mark}")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="+", help="logs of ptxas -v, or - for standard input")
    names = parser.parse_args(argv).logs
    log = "\n".join(sys.stdin.read() if name == "-" else Path(name).read_text() for name in names)
    kernels = parse(log)
    report(kernels)
    if not kernels:
        print("no kernels: was ptxas run with -v?", file=sys.stderr)
        return 2
    problems = [f"{kernel.arch}: {kernel.name} uses local memory" for kernel in kernels if not kernel.is_clean]
    problems += ignored_warnings(log)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
