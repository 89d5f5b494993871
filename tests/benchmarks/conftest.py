"""Fixtures of the suite's tests."""

import time

import pytest


@pytest.fixture
def virtual_time(monkeypatch):
    """A clock that stands still: ``virtual_time(seconds)`` advances what `time.monotonic` and `time.perf_counter` say."""
    now = [1000.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance
