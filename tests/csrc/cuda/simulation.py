"""Builds the CUDA kernels for the CPU (see ``simulated_device.h``) and runs the GPU backend of ``conv_frontend`` over them.

As a program, it checks the kernels once over the shapes that exercise every branch: what the sanitizers watch.

    python -m tests.csrc.cuda.simulation FOLDER     # with simulated_cuda.so in it
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Iterator, Optional

import torch
from torch import Tensor

from hubert_fast.cuda_backend import conv_frontend as backend
from tests.ops.comparison import error
from tests.ops.frontend_problem import HUBERT, Problem

ROOT = Path(__file__).parents[3]
SOURCES = [
    "csrc/cuda/first_layer_group_norm.cu",
    "csrc/cuda/first_layer_layer_norm.cu",
    "csrc/cuda/activations.cu",
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/gemm.cpp",
    "csrc/cuda/overlapping_maps.cpp",
    "tests/csrc/cuda/simulated_device.cpp",
    "tests/csrc/cuda/simulated_module.cpp",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# Error allowed against float64 of the reference, of features and of any gradient.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 0.04, torch.float16: 0.005}


def cuda_headers() -> Optional[Path]:
    """The folder of CUDA's headers, of which the simulation needs those of its 16-bit types and vectors."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def why_not() -> Optional[str]:
    """Why the simulation cannot be built here, or None."""
    if shutil.which("g++") is None or sys.platform != "linux":
        return "the simulation needs g++ on Linux"
    if cuda_headers() is None:
        return "the simulation needs CUDA's headers"
    if importlib.util.find_spec("pybind11") is None:
        return "the simulation needs pybind11"
    return None


def build(folder: Path, options: list[str]) -> None:
    """Builds ``simulated_cuda.so`` in ``folder``."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(cuda_headers())]
    command = "g++ -std=c++17 -O1 -g1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror".split()
    command += ["-Wno-unknown-pragmas", "-Wno-clobbered", *options]
    command += [f"-DHUBERT_FAST_{name}" for name in ("SIMULATE_CUDA", "WITH_CUDA", "WITH_SM80", "WITH_SM90")]
    command += [option for include in includes for option in ("-isystem", include)]
    command += ["-Icsrc", "-Icsrc/cuda", "-Itests/csrc/cuda", "-x", "c++", *SOURCES]
    command += ["-o", str(folder / "simulated_cuda.so")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def load(folder: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("simulated_cuda", folder / "simulated_cuda.so")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


_new_devices = itertools.count(1)


@contextmanager
def driver(module: ModuleType, *, takes_overlapping_maps: bool) -> Iterator[None]:
    """A device that nothing was asked about yet, with such a driver; device 0, whose driver takes every map, after it."""
    module.set_driver(takes_overlapping_maps)
    module.cuda.set_device(next(_new_devices))
    try:
        yield
    finally:
        module.set_driver(True)
        module.cuda.set_device(0)


class Kernels:
    """The simulated ``_C.cuda``, with or without its tensor-core products."""

    def __init__(self, module: ModuleType, *, tensor_cores: bool) -> None:
        self._cuda = module.cuda
        self._tensor_cores = tensor_cores

    def tensor_core_products_available(self, dtype: int) -> bool:
        return self._tensor_cores and self._cuda.tensor_core_products_available(dtype)

    def __getattr__(self, name: str):
        return getattr(self._cuda, name)


def run(module: ModuleType, problem: Problem, *, tensor_cores: bool, order: int = 0) -> list[Tensor]:
    """The features and every gradient, with blocks and threads in one of the three orders."""
    module.set_schedule(order, 0)
    kernels, arguments = Kernels(module, tensor_cores=tensor_cores), problem.arguments()
    with torch.no_grad(), uninitialised_as_nan():
        (features,), saved = backend.forward(arguments, True, kernels=kernels)
        gradients = backend.backward(
            arguments, saved, (problem.direction.to(problem.dtype),), [True] * 4, kernels=kernels
        )
    return [features, *(each for group in gradients for each in group)]


@contextmanager
def uninitialised_as_nan() -> Iterator[None]:
    """New tensors hold NaN inside, so that a value that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def problems(dtype: torch.dtype) -> list[Problem]:
    """HuBERT's layers over more than one block of every kernel, and layer 0 of other sizes with channels that fill no warp."""
    result = []
    for norm in ("group_norm", "layer_norm"):
        valid = torch.tensor([2700, 700]) if norm == "group_norm" else None
        result.append(Problem(HUBERT, norm=norm, samples=2700, channels=64, valid=valid, dtype=dtype))
        result.append(Problem([(7, 3), (3, 2)], norm=norm, batch=1, samples=900, channels=192, dtype=dtype, seed=1))
        result.append(Problem([(16, 16)], norm=norm, bias=False, samples=4300, channels=576, dtype=dtype, seed=2))
    return result


def check(module: ModuleType, dtype: torch.dtype, *, tensor_cores: bool, orders: tuple[int, ...] = (0,)) -> None:
    """Every problem agrees with the reference, to the bit the same in every order of blocks and threads."""
    for problem in problems(dtype):
        truth = problem.reference()
        results = [run(module, problem, tensor_cores=tensor_cores, order=order) for order in orders]
        errors = [error(given, exact) for given, exact in zip(results[0], truth, strict=True)]
        assert max(errors) <= TOLERANCE[dtype], (problem.shapes, problem.norm, errors)
        for other in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


if __name__ == "__main__":
    simulated = load(Path(sys.argv[1]))
    check(simulated, torch.float32, tensor_cores=False)
    for takes in (True, False):
        with driver(simulated, takes_overlapping_maps=takes):
            check(simulated, torch.bfloat16, tensor_cores=True)
    print("clean")
