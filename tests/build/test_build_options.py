"""tools/build_options.py: what the environment says about the build, and what is said when it cannot be done."""

import sys

import pytest

from tools import build_options

BuildError = build_options.BuildError


def _program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_defaults():
    options = build_options.read_options({})
    assert options.extension and options.cuda is None
    assert options.cuda_archs == ("80", "90a")
    assert options.jobs == build_options.available_cores() >= 1


@pytest.mark.parametrize(
    ("environment", "name", "value"),
    [
        ({"HUBERT_FAST_BUILD": "0"}, "extension", False),
        ({"HUBERT_FAST_BUILD": "1"}, "extension", True),
        ({"HUBERT_FAST_CUDA": "auto"}, "cuda", None),
        ({"HUBERT_FAST_CUDA": ""}, "cuda", None),
        ({"HUBERT_FAST_CUDA": "1"}, "cuda", True),
        ({"HUBERT_FAST_CUDA": "0"}, "cuda", False),
        ({"HUBERT_FAST_CUDA_ARCHS": "90a"}, "cuda_archs", ("90a",)),
        ({"HUBERT_FAST_CUDA_ARCHS": "80; 90a,100f 80"}, "cuda_archs", ("80", "90a", "100f")),
        ({"HUBERT_FAST_JOBS": "3"}, "jobs", 3),
    ],
)
def test_accepted_values(environment, name, value):
    assert getattr(build_options.read_options(environment), name) == value


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("HUBERT_FAST_BUILD", "no", "1, 0"),
        ("HUBERT_FAST_CUDA", "yes", "auto, 1, 0"),
        ("HUBERT_FAST_CUDA_ARCHS", "sm_80", "80;90a"),
        ("HUBERT_FAST_CUDA_ARCHS", "70", "from 80 on"),
        ("HUBERT_FAST_CUDA_ARCHS", ";", "80;90a"),
        ("HUBERT_FAST_CUDA_ARCHS", "8.0", "80;90a"),
        ("HUBERT_FAST_JOBS", "0", "from 1 to 9999"),
        ("HUBERT_FAST_JOBS", "two", "from 1 to 9999"),
    ],
)
def test_other_values_are_refused_with_the_name_the_value_and_what_is_accepted(name, value, accepted):
    with pytest.raises(BuildError) as caught:
        build_options.read_options({name: value})
    for part in (name, repr(value), accepted):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("jobs", "memory", "expected"), [(8, 7 << 30, 2), (2, 64 << 30, 2), (4, 1 << 30, 1), (4, None, 4), (1, 24 << 30, 1)]
)
def test_nvcc_gets_no_more_jobs_than_memory_allows(jobs, memory, expected):
    assert build_options.nvcc_jobs(jobs, memory) == expected


@pytest.mark.parametrize("environment", [{"PATH": ""}, {"PATH": "", "CXX": "icpx -O2"}])
def test_no_compiler_names_the_way_without_one(environment):
    with pytest.raises(BuildError, match="HUBERT_FAST_BUILD=0 installs the pure-Python package"):
        build_options.find_cxx(environment)


def test_compiler_named_with_a_launcher_and_options_is_split():
    assert build_options.find_cxx({"PATH": "/usr/bin:/bin", "CXX": "env c++ -O1"}) == ["env", "c++", "-O1"]


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo 'cc1plus: error: unrecognized option -std=c++17' >&2; exit 1", r"unrecognized option -std=c\+\+17"),
        ("exit 0", "exit status 0"),  # without a result
    ],
)
def test_compiler_that_will_not_do_is_refused_with_its_own_complaint(tmp_path, script, complaint):
    _program(tmp_path, "c++", script)
    with pytest.raises(BuildError, match=rf"will not do: .*{complaint}; .*HUBERT_FAST_BUILD=0"):
        build_options.find_cxx({"PATH": f"{tmp_path}:/usr/bin:/bin"})


def _nvcc(folder, release):
    folder.mkdir(parents=True)
    return _program(folder, "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")


def test_nvcc_is_taken_from_cudacxx_then_cuda_home_then_path_then_the_default_toolkit(tmp_path, monkeypatch):
    named, home, path, default = (_nvcc(tmp_path / name / "bin", f"13.{i}") for i, name in enumerate("abcd"))
    monkeypatch.setattr(build_options, "DEFAULT_TOOLKIT", str(tmp_path / "d"))
    environment = {"PATH": str(path.parent), "CUDA_HOME": str(tmp_path / "b"), "CUDACXX": str(named)}
    for expected, without in ((named, "CUDACXX"), (home, "CUDA_HOME"), (path, "PATH")):
        assert build_options.find_nvcc(environment).path == expected
        environment[without] = ""
    assert build_options.find_nvcc(environment) == build_options.Nvcc(default, (13, 3))


def test_no_nvcc_is_none_but_a_named_one_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(build_options, "DEFAULT_TOOLKIT", str(tmp_path))
    assert build_options.find_nvcc({"PATH": ""}) is None
    for name in ("CUDACXX", "CUDA_HOME"):
        with pytest.raises(BuildError, match=f"'{tmp_path}/none', which {name} names"):
            build_options.find_nvcc({"PATH": "", name: f"{tmp_path}/none"})


def test_old_or_broken_nvcc_is_refused(tmp_path):
    _nvcc(tmp_path / "old", "12.3")
    with pytest.raises(BuildError, match=r"is of CUDA 12\.3; 12\.4 is the oldest"):
        build_options.find_nvcc({"PATH": str(tmp_path / "old")})
    _nvcc(tmp_path / "odd", "")
    with pytest.raises(BuildError, match="names no release"):
        build_options.find_nvcc({"PATH": str(tmp_path / "odd")})


def test_nvcc_that_refuses_the_host_compiler_is_quoted(tmp_path):
    nvcc = build_options.Nvcc(_program(tmp_path, "nvcc", "echo 'error: unsupported GNU version!' >&2; exit 1"), (13, 0))
    with pytest.raises(
        BuildError, match="with the C.. compiler g..-99 cannot compile for 80;90a: .*unsupported GNU version"
    ):
        build_options.check_nvcc(nvcc, "g++-99", ("80", "90a"), {"PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize(
    ("cxx", "environment", "expected"),
    [
        (["c++"], {}, "c++"),
        (["ccache", "g++-12", "-O1"], {}, "g++-12"),
        (["clang++"], {"CUDAHOSTCXX": "g++-12"}, "g++-12"),
    ],
)
def test_nvcc_calls_the_compiler_of_everything_else_unless_told_otherwise(cxx, environment, expected):
    assert build_options.cuda_host_compiler(cxx, environment) == expected


def test_cutlass_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "cutlass_library"
    header = package / "source" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    header.write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0 \n#define CUTLASS_BUILD 7\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert build_options.find_cutlass() == (header.parents[1], "4.2.0")


def test_missing_cutlass_names_the_package(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BuildError, match="pip install 'nvidia-cutlass"):
        build_options.find_cutlass()
