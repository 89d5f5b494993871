"""Rows for tests that need some."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Report, Row, Seconds


def row(median: float = 1.0, *, spread: float = 0.1, **fields: Any) -> Row:
    """A row of a training step; ``spread`` is how far its 20th and 80th percentile lie from the median, relatively."""
    defaults: dict[str, Any] = {
        "kind": "step",
        "case": "base",
        "implementation": "hubert_fast",
        "version": "1.0",
        "device": "cpu",
        "dtype": "float32",
        "shape": {"model": "base"},
    }
    seconds = Seconds(median, median * (1 - spread), median * (1 + spread), 5)
    return Row(seconds=seconds, **{**defaults, **fields})


def report(*rows: Row, **machine: Any) -> Report:
    return Report({"torch": "2.13.0", "date": "2026-01-01", **machine}, {}, rows=list(rows))
