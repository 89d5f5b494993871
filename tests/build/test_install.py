"""The package built from its source archive, as pip does it, on a machine with and without compilers."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

from tests.build.repository import ROOT

# The compilers of the machine stay out of these tests' way.
STEERING = ("HUBERT_FAST_", "CXX", "CUDA", "PIP_CONSTRAINT")

# `import hubert_fast` would import torch: the library is loaded by its path. Prints why it has no CUDA kernels.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
facts = module.build_facts()
assert module.cpu.instruction_set() in facts["cpu_variants"]
print(facts["cuda_why_not"])
"""


def _run(command, folder, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}
    environment.update(variables)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def _backend(hook, folder, out, **variables):
    """Call the build backend in this environment: without isolation, without the network."""
    script = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    return _run([sys.executable, "-c", script], folder, **variables)


def _pip_wheel(tree, out, **variables):
    """(the wheel, what pip printed)."""
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(out), str(tree)]
    done = _run(command, tree.parent, **(variables or {"HUBERT_FAST_CUDA": "0"}))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    done = _backend("build_sdist", ROOT, folder)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name[: -len(".tar.gz")]


@pytest.fixture(scope="module")
def wheel(source_tree, tmp_path_factory):
    """A wheel with the CPU kernels, built by pip in an isolated environment."""
    return _pip_wheel(source_tree, tmp_path_factory.mktemp("wheel"))[0]


def _objects(source_tree):
    return {path: path.stat().st_mtime_ns for path in source_tree.glob("build/cmake-*/CMakeFiles/_C.dir/**/*.o")}


def test_source_archive_has_everything_but_what_was_built(source_tree):
    names = {str(path.relative_to(source_tree)) for path in source_tree.rglob("*") if path.is_file()}
    needed = {
        "CMakeLists.txt",
        "cmake/cuda.cmake",
        "csrc/module.cpp",
        "setup.py",
        "tools/build_options.py",
        "pyproject.toml",
    }
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_wheel_runs_in_an_environment_without_torch(wheel, tmp_path):
    assert "-cp3" in wheel.name and not wheel.name.endswith("-none-any.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    done = _run([python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
    assert done.returncode == 0, done.stderr
    script = LOAD + "assert importlib.util.find_spec('torch') is None and 'torch' not in sys.modules"
    (library,) = tmp_path.glob("venv/lib/python*/site-packages/hubert_fast/_C*")
    done = _run([python, "-c", script, library], tmp_path)
    assert done.stdout.strip() == "HUBERT_FAST_CUDA was 0", done.stderr


def test_wheel_has_the_kernels_and_the_benchmarks(wheel):
    """They lie beside the package in the source tree, and inside it once installed."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "benchmarks"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c")}
        assert {name for name in names if name.startswith(f"hubert_fast/{folder}/")} == {
            f"hubert_fast/{name}" for name in files
        }
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "tools/", "benchmarks/"))]


# Imports every module of the benchmarks; prints the package's folder and the names of what else that brought in.
IMPORT_BENCHMARKS = """
import importlib, json, pkgutil, sys, torch
before = set(sys.modules)
import hubert_fast.benchmarks as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name.rpartition(".")[2] != "__main__":
        importlib.import_module(module.name)
print(json.dumps([package.__path__[0], sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_installed_benchmarks_need_none_of_the_source_tree_and_import_no_extra(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    done = _run([sys.executable, "-c", IMPORT_BENCHMARKS], tmp_path)
    assert done.returncode == 0, done.stderr
    folder, imported = json.loads(done.stdout.splitlines()[-1])
    assert folder == str(tmp_path / "hubert_fast" / "benchmarks")
    unwanted = "benchmarks tools matplotlib numpy pytest torchaudio tqdm transformers".split()
    assert not set(imported) & set(unwanted)


def _unpacked_library(wheel, folder):
    shutil.unpack_archive(wheel, folder, "zip")
    (library,) = folder.glob("hubert_fast/_C*")
    return str(library)


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not there to list symbols")
def test_library_exports_its_initialiser_alone(wheel, tmp_path):
    """Any other name could be taken by another library in the process, or take its."""
    library = _unpacked_library(wheel, tmp_path)
    listed = _run(["nm", "--dynamic", "--defined-only", "--format=posix", library], tmp_path).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["PyInit__C"]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not there to list symbols")
def test_code_for_one_instruction_set_is_not_shared_with_the_others(wheel, source_tree):
    """A weak symbol (an inline function of the standard library, say) is kept once a library: with AVX-512 in it, if that
    is the copy that the linker takes."""
    objects = [path for path in _objects(source_tree) if path.parent.name == "instances"]
    assert objects
    for path in objects:
        listed = _run(["nm", "--defined-only", "--format=posix", str(path)], source_tree).stdout
        assert not [line for line in listed.splitlines() if line.split()[1] in "WVu"], path.name


def test_building_again_compiles_nothing_again(wheel, source_tree, tmp_path):
    before = _objects(source_tree)
    _pip_wheel(source_tree, tmp_path)
    assert before and _objects(source_tree) == before


def test_an_nvcc_that_cannot_be_used_is_left_out_with_a_warning(wheel, source_tree, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.3, V12.3.1'\n")
    nvcc.chmod(0o755)
    without_cuda, printed = _pip_wheel(source_tree, tmp_path / "out", CUDACXX=str(nvcc))
    why = f"{nvcc} is of CUDA 12.3; 12.4 is the oldest that can be used"
    assert f"hubert_fast: warning: building without CUDA: {why}" in printed
    done = _run([sys.executable, "-c", LOAD, _unpacked_library(without_cuda, tmp_path)], tmp_path)
    assert done.stdout.strip() == why, done.stderr


def test_pure_python_package_needs_no_compiler(source_tree, tmp_path):
    done = _backend("build_wheel", source_tree, tmp_path, HUBERT_FAST_BUILD="0", PATH="", CXX="none")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    assert not list(tmp_path.glob("unpacked/hubert_fast/_C*"))


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"PATH": ""}, "no C++ compiler was found (c++, g++, clang++); install g++ or clang++, or HUBERT_FAST_BUILD=0"),
        (
            {"CXX": "/none/c++"},
            "there is no '/none/c++', which CXX names; install g++ or clang++, or HUBERT_FAST_BUILD=0",
        ),
        ({"HUBERT_FAST_CUDA": "1", "CUDA_HOME": "/none"}, "HUBERT_FAST_CUDA is 1, but there is no bin/nvcc in '/none'"),
        ({"HUBERT_FAST_CUDA": "maybe"}, "HUBERT_FAST_CUDA is 'maybe'; accepted are auto, 1, 0 or unset"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(source_tree, tmp_path, hook, variables, sentence):
    done = _backend(hook, source_tree, tmp_path, **variables)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"hubert_fast cannot be built: {sentence}")
    assert "Traceback" not in done.stderr and "CMake" not in done.stdout + done.stderr


def test_source_archive_can_be_made_without_a_compiler(tmp_path):
    done = _backend("build_sdist", ROOT, tmp_path, PATH="", HUBERT_FAST_CUDA="1", CUDA_HOME="/none")
    assert done.returncode == 0, done.stderr
