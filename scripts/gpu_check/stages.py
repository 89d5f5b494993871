"""The stages of the check, in the order of what they tell."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Optional

from scripts.gpu_check.running import Stage, module

# Minutes that the suite takes, and what it may need beyond them to begin and to end, in seconds.
_OPERATOR_MINUTES, _SUITE_MINUTES, _BEYOND = 1.3, 4.0, 25
_ON_CPU = ["--models", "tiny", "--minutes", "0.1"]


def _warm(out: Path, device: str) -> Optional[list[str]]:
    if device == "cpu":
        return None
    # What smoke and step launch; the rest is compiled where it is met.
    models = ["--size", "base", "--dtype", "bfloat16", "float32", "--arch", "90"]
    return [sys.executable, "-m", "tools.aot", "--warm", *models, "--jobs", str(os.cpu_count() or 1)]


def _operators(out: Path, device: str) -> list[str]:
    options = ["--models", "base", "--dtypes", "bfloat16", "--minutes", str(_OPERATOR_MINUTES)]
    return _suite(out, "bench-operators", ["--cases", "operators", *(options if device == "cuda" else _ON_CPU)])


def _everything(out: Path, device: str) -> list[str]:
    return _suite(out, "bench", ["--minutes", str(_SUITE_MINUTES)] if device == "cuda" else _ON_CPU)


def _suite(out: Path, name: str, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "scripts.gpu_check.suite", str(out), name, *options]


def _limit(minutes: float) -> int:
    return round(60 * minutes) + _BEYOND


STAGES = {
    each.name: each
    for each in (
        Stage("install", "the package and its wheels; the extension only where none was brought", 200, module("install")),
        Stage("warm", "Triton kernels, compiled in parallel beside what comes next", 90, _warm, beside=True),
        Stage("environment", "versions, backends, limits of the device", 60, module("environment"),
              shows=("environment", "gpu", "extension", "limits")),
        Stage("smoke", "loss and every gradient of the model against float64, then each operator alone", 90,
              module("smoke"), shows=("smoke",)),
        Stage("step", "whole steps: ours, ours in a graph, torchaudio; kernels by time", 75, module("step"),
              shows=("step", "profile", "kernel")),
        Stage("graphs", "updates in CUDA graphs: as a plain loop's, how fast, what is captured; extraction", 60,
              module("graphs"), shows=("graphs",)),
        Stage("switches", "each change of the step on and off, in graphs: what it saves", 60, module("switches"),
              shows=("switches",)),
        Stage("determinism", "two runs from one seed, equal to the bit", 30, module("determinism"), shows=("determinism",)),
        Stage("tests", "pytest -m gpu but for the kernels' own, in parallel", 130,
              module("gpu_tests", "most"), shows=("tests", "failed test")),
        Stage("kernels", "the kernels' own tests, property tests among them", 130,
              module("gpu_tests", "kernels"), shows=("tests", "failed test")),
        Stage("large", "the tests that want tens of gigabytes to themselves", 40, module("gpu_tests", "large"),
              shows=("tests", "failed test")),
        Stage("peers", "whole steps beside torchaudio compiled, transformers and minimal-hubert", 200,
              module("step", "peers"), shows=("step",)),
        Stage("operators", "each operator beside its alternatives and its floor", _limit(_OPERATOR_MINUTES), _operators),
        Stage("converge", "300 steps on the kernels and on the reference, from two seeds", 90, module("converge"),
              shows=("converge",)),
        Stage("memcheck", "compute-sanitizer over every kernel: addresses", 75, module("sanitize", "memcheck"),
              shows=("sanitize",)),
        Stage("racecheck", "compute-sanitizer over every kernel: shared memory", 75, module("sanitize", "racecheck"),
              shows=("sanitize",)),
        Stage("pretrain", "the main job, on GPU_CHECK_AUDIO or the embedded corpus", 240, module("pretrain"),
              shows=("pretrain",)),
        Stage("suite", "hubert-fast bench, for the published tables", _limit(_SUITE_MINUTES), _everything),
    )
}  # fmt: skip

PARTS = {
    "install": ("install", "warm", "environment"),
    "a": ("install", "warm", "environment", "smoke", "step", "graphs", "determinism", "tests", "kernels"),
    "b": ("switches", "large", "peers", "operators", "converge", "memcheck", "racecheck", "pretrain"),
    "sanitize": ("memcheck", "racecheck"),
}
