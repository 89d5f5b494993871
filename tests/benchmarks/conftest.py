"""Fixtures of the suite's tests."""

import time

import pytest
import torch

from benchmarks import suite
from tests.benchmarks import fabricated


class LosableDevice:
    """A stand-in for a CUDA context: once it is lost, whoever waits for the device gets the same error, in this process."""

    def __init__(self):
        self.is_lost = False

    def lose(self):
        self.is_lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    def synchronize(self, device=None):
        if self.is_lost:
            self.lose()


@pytest.fixture
def quick(monkeypatch):
    """Few turns, given limits, and no stages: they have tests of their own, and a profiler takes seconds."""
    monkeypatch.setattr(suite, "split", lambda *arguments: {"loss": 1.0})
    monkeypatch.setattr(suite, "_MOST", {"cpu": 5})
    monkeypatch.setattr(suite, "measure_limits", lambda device, dtype: fabricated.LIMITS)


@pytest.fixture
def losable(monkeypatch):
    """The CPU as a `LosableDevice`."""
    device = LosableDevice()
    monkeypatch.setattr(torch.cpu, "synchronize", device.synchronize)
    return device


@pytest.fixture
def virtual_time(monkeypatch):
    """A clock that stands still: ``virtual_time(seconds)`` advances what `time.monotonic` and `time.perf_counter` say."""
    now = [1000.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance
