"""Installs the package and the wheels that were brought; compiles the extension only where none was brought for this Python.

python -m scripts.gpu_check.install OUT
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from scripts.gpu_check.facts import Facts, facts_of_process
from scripts.gpu_check.running import wheels_folder

ROOT = Path(__file__).parents[2]
_WITHOUT_NETWORK = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
_EDITABLE = [*_WITHOUT_NETWORK, "--no-build-isolation", "--editable", str(ROOT)]


def main() -> int:
    facts = facts_of_process()
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    if wheels:
        command = [*_WITHOUT_NETWORK, "--no-compile", "--upgrade", "--target", str(wheels_folder()), *wheels]
        _pip(facts, "wheels", command)
    if _is_installed():
        facts.note("install", what="package", ok=True, already=True)
        return 0
    if brought_extension() is not None:
        return _package(facts)
    if _pip(facts, "build", _EDITABLE, HUBERT_FAST_CUDA="1", HUBERT_FAST_CUDA_ARCHS="90a") == 0:
        return 0
    return _package(facts)  # the Triton kernels can be checked and measured without the extension


def _package(facts: Facts) -> int:
    """Install without compiling. Where that fails (an old setuptools, say), links put packages where they are imported from."""
    if _pip(facts, "package", _EDITABLE, HUBERT_FAST_BUILD="0") != 0:
        for name in ("kernels", "benchmarks"):
            link = ROOT / "hubert_fast" / name
            if not link.exists():
                link.symlink_to(ROOT / name, target_is_directory=True)
        facts.note("install", what="links", ok=True)
    return 0


def brought_extension() -> Path | None:
    """The extension built for this Python, where there is one."""
    path = ROOT / "hubert_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


def _is_installed() -> bool:
    """Whether the environment has this tree's package already, looked for from elsewhere."""
    code = f"import hubert_fast.kernels; raise SystemExit(not hubert_fast.__file__.startswith({str(ROOT)!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT.anchor, stderr=subprocess.DEVNULL).returncode == 0


def _pip(facts: Facts, what: str, command: list[str], **environment: str) -> int:
    code = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT).returncode
    facts.note("install", what=what, ok=code == 0, extension=str(brought_extension() and brought_extension().name))
    return code


if __name__ == "__main__":
    sys.exit(main())
