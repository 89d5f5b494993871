"""Every kernel once under compute-sanitizer, at sizes that are not round.

    python -m scripts.gpu_check.sanitize OUT memcheck|racecheck
    python -m scripts.gpu_check.sanitize OUT here              # what is watched

A step of one layer of Base and one of Large (both extractors, post- and pre-norm), by the objective and by logits, in bfloat16
and float32; widths are the models', so that the kernels are those that a step has compiled already.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import facts_of_process

_FOUND = 9  # exit code of the sanitizer's where it found something
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*")
_ERRORS_NOTED = 4
_ROOT = Path(__file__).parents[2]


def main() -> int:
    facts, tool = facts_of_process(), sys.argv[2]
    if tool == "here":
        steps()
        return 0
    watched = [sys.executable, "-m", "scripts.gpu_check.sanitize", str(facts.out), "here"]
    if not ON_GPU:
        facts.note("sanitize", tool=tool, summary="no GPU: not watched")
        return subprocess.run(watched).returncode
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    filters = _our_kernels() if tool == "racecheck" else []
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), *filters, *watched]
    said = facts.out / f"{tool}.txt"
    # Each tensor an allocation of its own, or memcheck sees nothing outside of PyTorch's large ones.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = None
    try:
        with said.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    finally:  # a stage that is over its time tells what it has
        text = said.read_text(errors="replace")
        said.unlink()
        print(text)
        lines = text.splitlines()
        errors = [
            line for line in lines if line.startswith("=========") and re.search(r"Invalid|hazard|[Ee]rror", line)
        ]
        summary = next((line for line in reversed(lines) if _SUMMARY.match(line)), "none")
        ran = sum(line.startswith("ran ") for line in lines)
        facts.note(
            "sanitize", tool=tool, code=code, ran=ran, summary=summary.strip("= "), errors=errors[:_ERRORS_NOTED]
        )
    return code


def _our_kernels() -> list[str]:
    """Options that leave out what is not ours: racecheck knows little of the barriers of cuBLAS's and cuDNN's kernels."""
    sources = (path.read_text() for path in (_ROOT / "kernels").glob("*.py") if path.name != "launch.py")
    triton = {name for source in sources for name in re.findall(r"\blaunch\(\s*(\w+),", source)}
    filters = ["kernel_substring=hubert_fast", *(f"kernel_name={name}" for name in sorted(triton))]
    return [option for each in filters for option in ("--kernel-name", each)]


def steps() -> None:
    """Forward and backward of small batches, with padding."""
    import torch

    from benchmarks.batches import make
    from benchmarks.clock import synchronize
    from benchmarks.peers.agreement import weights_of
    from benchmarks.peers.ours import ObjectiveModel, build_model
    from benchmarks.peers.recipe import RecipeModel
    from scripts.gpu_check.models import NUM_CLASSES, architecture, setting

    for name in ("base", "large"):
        chosen = architecture(name).changed(layers=1)
        batch = make([9_001, 7_777, 4_321], chosen, NUM_CLASSES, seed=3).to(DEVICE)
        for dtype in ("bfloat16", "float32"):
            built = setting(chosen, dtype, padded=True)
            for wrapped in (ObjectiveModel, RecipeModel):
                model = wrapped(build_model(built, weights_of(built)))
                torch.manual_seed(3)
                model.forward_backward(batch, built.dtype)
                synchronize(DEVICE)
                print("ran", name, dtype, wrapped.__name__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
