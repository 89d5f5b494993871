"""Compiles every Triton kernel for GPUs that are not there, and fails on register spills or too much shared memory.

    python -m tools.aot                                             # everything
    python -m tools.aot --operator masked_attention --arch 90 --size base --dtype bfloat16 --keep DIR
    python -m tools.aot --warm --arch 90 --size base --dtype bfloat16 --jobs 16     # before a first step on an H100

The kernels of each operator are launched on meta tensors with the shapes of a model (launches.py); the launches are recorded,
and Triton's own launcher compiles them, with the block sizes that they would have on that architecture, into the cache where
it looks for them (TRITON_CACHE_DIR): a training step that finds them there compiles nothing. No driver is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import triton

from benchmarks.sizes import SIZES
from tools.aot.compiling import DTYPES, SHARED_BYTES, Job, fill_cache, key_of, launches_of, run
from tools.aot.launches import OPERATORS


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
        work = fill_cache if arguments.warm else partial(run, keep=arguments.keep)
        futures = [pool.submit(work, job, number) for job, number in _distinct(jobs)]
        results = [future.result() for future in futures]
    for each in results:
        if each.problem or not arguments.warm:
            print(
                f"sm_{each.job.arch} {each.job.size} {each.job.dtype} {each.kernel} [{each.variant}]: "
                f"{each.registers} registers, {each.shared} bytes shared, {each.problem or 'ok'}"
            )
    failures = sum(bool(each.problem) for each in results)
    print(f"{len(results)} kernels compiled with Triton {triton.__version__}, {failures} with problems")
    return int(any(each.cannot_run if arguments.warm else each.problem for each in results))


def _distinct(jobs: list[Job]) -> Iterator[tuple[Job, int]]:
    """(job, number of the launch among its launches) of each kernel once."""
    seen = set()
    for job in jobs:
        for number, launch in enumerate(launches_of(job)):
            key = key_of(launch)
            if key not in seen:
                seen.add(key)
                yield job, number


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--size", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED_BYTES), default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--warm", action="store_true", help="only fill the cache, and name kernels that cannot run")
    parser.add_argument("--keep", type=Path, help="folder for the PTX and machine code of each kernel")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
