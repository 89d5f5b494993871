"""``tools/check_ptxas.py`` reads what ptxas says, and says no to local memory."""

import pytest

from hubert_fast import extension
from tests.build.repository import ROOT
from tools import check_ptxas

CLEAN = """ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem
"""
SPILLED = """ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    40 bytes stack frame, 36 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers
"""
HINT_IGNORED = "ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum\n"
INDEXED = SPILLED.replace("36 bytes spill stores, 24 bytes", "0 bytes spill stores, 0 bytes")


def test_kernels_are_read_from_the_log():
    good, bad = check_ptxas.parse(CLEAN + SPILLED)
    assert (good.arch, good.registers, good.stack, good.spills) == ("sm_80", 96, 0, 0)
    assert (bad.arch, bad.registers, bad.stack, bad.spills) == ("sm_90a", 255, 40, 60)


@pytest.mark.parametrize(
    ("log", "code"), [(CLEAN, 0), (CLEAN + SPILLED, 1), (INDEXED, 1), (CLEAN + HINT_IGNORED, 1), ("nothing", 2)]
)
def test_exit_code_says_what_was_found(tmp_path, log, code):
    path = tmp_path / "log"
    path.write_text(log)
    assert check_ptxas.main([str(path)]) == code


@pytest.mark.skipif(extension.cuda() is None, reason=str(extension.why_not("cuda")))
def test_no_kernel_of_the_installed_extension_uses_local_memory():
    """As ptxas told the build, which setup.py keeps in the source tree."""
    logs = sorted((ROOT / "build").glob("cmake-*/build.log"), key=lambda path: path.stat().st_mtime)
    logs = [text for text in (path.read_text() for path in logs) if "Compiling entry function" in text]
    if not logs:
        pytest.skip("this extension was built elsewhere")
    assert not check_ptxas.ignored_warnings(logs[-1])
    latest = {(kernel.name, kernel.arch): kernel for kernel in check_ptxas.parse(logs[-1])}  # of several builds
    assert [kernel for kernel in latest.values() if not kernel.is_clean] == []
    assert {arch.removeprefix("sm_") for _, arch in latest} >= set(extension.facts()["cuda_archs"])
    for each in extension.facts()["cuda_archs"]:
        products = [name for name, arch in latest if arch == f"sm_{each}" and "cutlass" in name]
        assert len(products) == 8  # four products in two dtypes, by CUTLASS 3.x for 90a and 2.x for the others
