"""Builds hubert_fast/_C with CMake and Ninja; everything else about the package is in pyproject.toml.

The environment variables that steer the build are listed in tools/build_options.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import build_options  # noqa: E402  (in the source tree, not on the path of an isolated build)
from build_options import BuildError, Nvcc  # noqa: E402


class CMakeBuild(build_ext):
    """Has CMake compile in a folder of its own for each set of settings, where the next build finds what it can keep."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        library = _or_exit(_compile, target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new contents: a process that has the old one loaded keeps it.
        target.unlink(missing_ok=True)
        shutil.copyfile(library, target)


def _or_exit(function: Callable, *arguments):
    """A person reads a sentence, not a traceback."""
    try:
        return function(*arguments)
    except BuildError as error:
        raise SystemExit(f"hubert_fast cannot be built: {error}") from None


def _compilers() -> tuple[list[str], Optional[Nvcc], str]:
    """(the C++ compiler's command, nvcc or None, why not)."""
    cxx = build_options.find_cxx(os.environ)
    if OPTIONS.cuda is False:
        return cxx, None, "HUBERT_FAST_CUDA was 0"
    try:
        nvcc = build_options.find_nvcc(os.environ)
        if nvcc is None and OPTIONS.cuda is None:
            return cxx, None, build_options.NO_NVCC
        if nvcc is None:
            raise BuildError(build_options.NO_NVCC)
        host_compiler = build_options.cuda_host_compiler(cxx, os.environ)
        build_options.check_nvcc(nvcc, host_compiler, OPTIONS.cuda_archs, os.environ)
        build_options.find_cutlass()
        return cxx, nvcc, ""
    except BuildError as error:
        if OPTIONS.cuda:
            raise BuildError(f"HUBERT_FAST_CUDA is 1, but {error}") from None
        print(f"hubert_fast: warning: building without CUDA: {error}", file=sys.stderr)
        return cxx, None, str(error)


def _compile(library: str) -> Path:
    """The path of the compiled ``library`` (a file name)."""
    cxx, nvcc, why_not = _compilers()
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": _kept_pybind11() / "share" / "cmake" / "pybind11",
        "HUBERT_FAST_CUDA": "OFF",
    }
    if nvcc is not None:
        include, version = _kept_cutlass()
        settings |= {
            "CMAKE_CUDA_COMPILER": nvcc.path,
            "CMAKE_CUDA_HOST_COMPILER": build_options.cuda_host_compiler(cxx, os.environ),
            "HUBERT_FAST_CUDA": "ON",
            "HUBERT_FAST_CUDA_ARCHS": ";".join(OPTIONS.cuda_archs),
            "HUBERT_FAST_CUTLASS_INCLUDE": include,
            "HUBERT_FAST_CUTLASS_VERSION": version,
        }
    # What CMake reads from the environment when it first configures a folder, and the compiler behind the name.
    flags = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS")}
    flags["compiler version"] = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    key = json.dumps([settings, cxx, library, sys.version, flags], sort_keys=True, default=str)
    folder = ROOT / "build" / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    settings["HUBERT_FAST_CUDA_WHY_NOT"] = why_not
    settings["HUBERT_FAST_CUDA_JOBS"] = build_options.nvcc_jobs(OPTIONS.jobs, build_options.available_memory())
    settings["CMAKE_MAKE_PROGRAM"] = _tool("ninja")
    environment = {**os.environ, "CXX": shlex.join(cxx)}
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    _run([_tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *definitions], environment)
    _run([_tool("cmake"), "--build", folder, "--parallel", OPTIONS.jobs], environment, log=folder / "build.log")
    return folder / library


def _kept_pybind11() -> Path:
    import pybind11

    return _kept(Path(pybind11.__file__).parent, f"pybind11-{pybind11.__version__}")


def _kept_cutlass() -> tuple[Path, str]:
    include, version = build_options.find_cutlass()
    return _kept(include, f"cutlass-{version}"), version


def _kept(folder: Path, name: str) -> Path:
    """A copy of ``folder`` in build/, where it stays: an isolated build installs it anew each time, elsewhere, with new
    times, and everything would be compiled again."""
    kept = ROOT / "build" / "dependencies" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            Path(shutil.copytree(folder, Path(temporary, name))).rename(kept)
    return kept


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"{name} was not found: pip install {name}, or let pip build in isolation")
    return path


def _run(command: list, environment: dict[str, str], log: Path = Path(os.devnull)) -> None:
    """Runs a command and appends what it says to ``log`` too, where tests find what ptxas said about each kernel."""
    command = [str(word) for word in command]
    with (
        log.open("a") as kept,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout:
            sys.stdout.write(line)
            kept.write(line)
    if process.returncode != 0:
        raise BuildError(f"`{shlex.join(command)}` failed (its messages are above); {build_options.WITHOUT_COMPILER}")


def _setup_requires() -> list[str]:
    """CUTLASS brings scipy and more into the build environment, so it is asked for only where CUDA will be compiled."""
    if not OPTIONS.extension or OPTIONS.cuda is False:
        return []
    try:
        return [] if build_options.find_nvcc(os.environ) is None else [build_options.CUTLASS_REQUIREMENT]
    except BuildError:
        return []  # the build itself will tell, if it comes to that


# Packages that lie beside hubert_fast/ in the source tree and are inside it once installed.
BESIDE = {
    f"hubert_fast.{package}": package.replace(".", "/")
    for package in find_packages(include=["kernels*", "benchmarks*"])
}
OPTIONS = _or_exit(build_options.read_options, os.environ)
setup(
    packages=[*find_packages(include=["hubert_fast*"]), *BESIDE],
    package_dir=BESIDE,
    ext_modules=[Extension("hubert_fast._C", sources=[])] if OPTIONS.extension else [],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=_setup_requires(),
)
