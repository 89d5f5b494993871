"""Every kernel compiles for every architecture at the published models' shapes, without spills, in the shared memory there is.

HUBERT_FAST_COMPILE_ALL=1 compiles large and xlarge for every architecture, as `python -m tools.aot` does; without it for sm_90,
where such models are trained.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

ROOT = Path(__file__).parents[2]
LARGER_FOR = ("80", "90", "100") if os.environ.get("HUBERT_FAST_COMPILE_ALL") == "1" else ("90",)

# sizes, architectures and dtype of a run; all operators in one, because to start a compiler's process takes seconds too.
BASE_FOR_90 = (("base",), ("86", "90"), "bfloat16")
GRIDS = [
    BASE_FOR_90,
    (("base",), ("80", "100"), "bfloat16"),
    (("base",), ("90",), "float32"),
    *((("large", "xlarge"), (arch,), "bfloat16") for arch in LARGER_FOR),
]


def _python(*arguments):
    """Compiling takes kernels that are not interpreted, so a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


@functools.cache
def _compile(sizes, archs, dtype):
    """Lines of ``python -m tools.aot`` for all operators; one that launches nothing is an error there."""
    done = _python("-m", "tools.aot", "--size", *sizes, "--arch", *archs, "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("sizes", "archs", "dtype"), GRIDS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_kernels_compile_at_a_models_shapes(sizes, archs, dtype):
    lines = _compile(sizes, archs, dtype)
    assert re.fullmatch(r"\d+ kernels compiled with Triton [\d.]+, 0 with problems", lines[-1])
    compiled = {re.match(r"sm_(\d+) (\w+) (\w+) \w+ ", line).groups() for line in lines[:-1]}
    assert compiled == {(arch, size, dtype) for arch in archs for size in sizes}


def test_no_kernel_is_left_out():
    found = (re.match(r"sm_90 \w+ \w+ (\w+)", line) for line in _compile(*BASE_FOR_90))
    compiled = {match[1] for match in found if match}
    launched = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"\blaunch(?:_tiles|_parts)?\(\s*(_\w+),", path.read_text())
    }
    assert launched and launched - compiled == set()


def test_training_and_evaluation_look_up_the_keys_under_which_kernels_are_compiled_ahead():
    done = _python("-m", "tests.kernels.step_keys")
    found = re.findall(r"^(\w+, \w+): (\d+) launches looked up, 0 not compiled ahead$", done.stdout, re.MULTILINE)
    looked_up = ["base, bfloat16", "base, float32", "base, tf32", "large, bfloat16"]
    assert [which for which, _ in found] == looked_up, done.stdout + done.stderr
    assert all(int(launches) > 100 for _, launches in found)


_SPILLING = """
import torch, triton, triton.language as tl
from hubert_fast.kernels.launch import Blocks, launch, recording
from tools.aot.compiling import Job, compiled

@triton.jit
def spilling(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b, c = tl.load(x + at), tl.load(x + SIZE + at), tl.load(x + 2 * SIZE + at)  # 128 registers a thread each
    tl.store(x + at, a * tl.sum(b, 0) + b * tl.sum(c, 0) + c * tl.sum(a, 0))

@triton.jit
def greedy(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for part in range(0, 64):
        total += tl.dot(tl.load(x + part * SIZE * SIZE + at), tl.load(x + (part + 64) * SIZE * SIZE + at))
    tl.store(x + at, total.to(x.dtype.element_ty))

@triton.jit
def broken(x):
    tl.store(x, tl.arange(0, 3))

with recording(80) as launches:
    launch(spilling, None, {"x": torch.empty(1, device="meta")}, [Blocks({"SIZE": 4096}, 1)])
    launch(greedy, None, {"x": torch.empty(1, dtype=torch.bfloat16, device="meta")}, [Blocks({"SIZE": 128}, 8, 4)])
    launch(broken, None, {"x": torch.empty(1, device="meta")}, [Blocks()])
for each in launches:
    print(each.kernel.__name__, compiled(Job("none", "none", "float32", 80), each).problem)
"""


def test_a_kernel_that_spills_or_wants_too_much_shared_memory_or_does_not_compile_is_found(tmp_path):
    path = tmp_path / "spilling_kernels.py"  # Triton reads a kernel's source from its file
    path.write_text(_SPILLING)
    done = _python("-c", f"import runpy; runpy.run_path({str(path)!r})")
    assert re.search(r"^spilling \d+ bytes a thread spilled$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert re.search(r"^greedy \d+ bytes of shared memory; sm_80 has 166912$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^broken does not compile: \w+: .*power of 2", done.stdout, re.MULTILINE), done.stdout
