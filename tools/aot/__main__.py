"""Compiles every Triton kernel for GPUs that are not there, and fails on register spills or too much shared memory.

    python -m tools.aot                                             # everything
    python -m tools.aot --operator masked_attention --arch 90 --size base --dtype bfloat16 --keep DIR

Each module of this package launches the kernels of its operator on meta tensors with the shapes of a model; the launches are
recorded and compiled with the block sizes that they would have on that architecture.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton

from benchmarks.sizes import SIZES
from tools.aot.compiling import SHARED_BYTES, Job, run

_HERE = Path(__file__).parent
OPERATORS = sorted(path.stem for path in _HERE.glob("*.py") if path.stem not in ("__main__", "compiling"))


def main() -> int:
    arguments = _arguments()
    jobs = [
        Job(operator, size, dtype, arch)
        for operator in arguments.operator
        for size in arguments.size
        for dtype in arguments.dtype
        for arch in arguments.arch
    ]
    # Forking a process whose threads hold locks can hang it.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        compiled = [each for result in pool.map(run, jobs, [arguments.keep] * len(jobs)) for each in result]
    for each in compiled:
        verdict = each.problem or "ok"
        print(
            f"sm_{each.job.arch} {each.job.size} {each.job.dtype} {each.kernel} [{each.variant}]: {each.registers} registers, "
            f"{each.shared} bytes shared, {verdict}"
        )
    failures = sum(bool(each.problem) for each in compiled)
    print(
        f"{len(compiled)} kernels compiled with Triton {triton.__version__}, {failures} with spills or too much shared memory"
    )
    return 1 if failures or not compiled else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED_BYTES), default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--keep", type=Path, help="folder for the PTX and machine code of each kernel")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
