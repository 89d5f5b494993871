"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
X86 = platform.machine() in ("x86_64", "AMD64")

_BASE = "-std=c++17 -O1 -g -Wall -Wextra -Werror".split()
_KERNELS = "-ffp-contract=fast -fno-math-errno -fno-trapping-math".split()
_AVX2 = "-mavx2 -mfma -mf16c".split()
_AVX512 = [*_AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()]
_INSTANCES = {"baseline": []}
if X86:
    _INSTANCES |= {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def _build(folder: Path, sanitizers: list[str]) -> Path:
    defines = ["-DHUBERT_FAST_X86"] if X86 else []
    sources = {CPU / "instances" / f"{name}.cpp": [*_KERNELS, *flags] for name, flags in _INSTANCES.items()}
    sources |= {CPU / f"{name}.cpp": defines for name in ("conv_frontend", "dispatch", "dropout", "parallel")}
    sources |= {ROOT / "tests" / "csrc" / "cpu" / "sanitize.cpp": []}

    def compile_(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *_BASE, *sanitizers, *sources[source], "-I", CPU, "-c", source, "-o", target]
        subprocess.run([str(word) for word in command], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
        objects = list(pool.map(compile_, sources))
    program = folder / "sanitize"
    subprocess.run([COMPILER, *sanitizers, *map(str, objects), "-o", str(program), "-ldl", "-pthread"], check=True)
    return program


@pytest.mark.parametrize(
    "sanitizers",
    [["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-fsanitize=thread"]],
    ids=["address-undefined", "thread"],
)
def test_no_sanitizer_complains(sanitizers, tmp_path):
    program = _build(tmp_path, sanitizers)
    result = subprocess.run([program, "25"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert int(re.fullmatch(r"(\d+) cases\n", result.stdout)[1]) >= 125
