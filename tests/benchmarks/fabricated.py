"""Reports that nobody measured, for tests of what is made from reports."""

from benchmarks.report import LeftOut, Limits, Report, Row, Seconds

LIMITS = Limits(bytes_per_second=1e10, flops_per_second=1e11)


def row(median=1.0, *, spread=0.1, **fields):
    """A row of a training step; ``spread`` is how far its 20th and 80th percentile lie from the median, relatively."""
    settings = {"kind": "step", "case": "base", "implementation": "hubert_fast", "version": "1.0", "device": "cpu"}
    settings |= {"dtype": "float32", "shape": {"model": "base", "classes": 500}}
    seconds = Seconds(median, median * (1 - spread), median * (1 + spread), 5)
    return Row(seconds=seconds, **{**settings, **fields})


def report(*rows, left_out=(), **machine):
    machine = {"device": "Imagined CPU", "torch": "2.13.0", "hubert_fast": "0.1", "date": "2026-01-01", **machine}
    limits = {"float32": LIMITS, "bfloat16": LIMITS}
    return Report(machine, {"minutes": 5.0}, limits, list(rows), [LeftOut(*each) for each in left_out])
