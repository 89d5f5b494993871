"""What runs here: versions, the device, backends and why others do not run, and the rates that floors stand on.

python -m scripts.gpu_check.environment OUT
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time

from scripts.gpu_check.device import ON_GPU
from scripts.gpu_check.facts import Facts, facts_of_process

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "torchaudio",
    "transformers",
    "minimal-hubert",
    "pytest",
    "pytest-xdist",
    "lhotse",
)
_CARD = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used"


def main() -> None:
    facts = facts_of_process()
    started = time.monotonic()
    import torch

    versions = {name: _version(name) for name in _PACKAGES}
    facts.note("environment", python=sys.version.split()[0], cores=os.cpu_count(), versions=versions,
               import_torch_s=round(time.monotonic() - started, 2))  # fmt: skip
    if ON_GPU:
        _gpu(facts, torch)
        _limits(facts)
    import hubert_fast
    from hubert_fast import extension

    why_not = {part: extension.why_not(part) for part in ("cpu", "cuda")}
    facts.note("extension", facts=extension.facts(), why_not=why_not)
    facts.note("backends", **{each.operator: [each.runs, each.reasons] for each in hubert_fast.backend.report()})
    if ON_GPU and extension.cuda() is not None:
        facts.note("overlapping maps", used=extension.cuda().overlapping_maps())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(facts: Facts, torch) -> None:
    started = time.monotonic()
    torch.zeros(1, device="cuda")
    seconds = time.monotonic() - started
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
    try:
        card = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        card = f"{type(error).__name__}: {error}"
    facts.note("gpu", name=properties.name, sms=properties.multi_processor_count, bytes=properties.total_memory,
               capability=torch.cuda.get_device_capability(), context_s=round(seconds, 2), card=card)  # fmt: skip


def _limits(facts: Facts) -> None:
    import torch

    from benchmarks.limits import measure_limits

    found = measure_limits("cuda", torch.bfloat16)
    facts.note("limits", tflops_bf16=found.flops_per_second / 1e12, copy_tb_per_s=found.bytes_per_second / 1e12)


if __name__ == "__main__":
    main()
