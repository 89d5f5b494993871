"""Reports that nobody measured, for tests of what is made from reports."""

from benchmarks.report import LeftOut, Limits, Report, Row, Seconds

LIMITS = Limits(bytes_per_second=1e10, flops_per_second=1e11)


def seconds(median, spread=0.1, count=5):
    return Seconds(median, median * (1 - spread), median * (1 + spread), count)


def row(implementation="hubert_fast", median=1.0, **fields):
    shape = {"model": "base", "classes": 500, "utterances": 2, "audio_seconds": 8.0, "padding": 0.0, "lengths": "even"}
    settings = {
        "kind": "step",
        "case": "base, 500 classes, 2 x 4 s",
        "version": "1.0",
        "device": "cpu",
        "dtype": "float32",
        "shape": shape,
        "seconds": seconds(median),
        "peak_bytes": 2 << 30,
        "step_bytes": 1 << 30,
        "audio_seconds": 8.0,
        "flops": 3.7e10,
        "limits": LIMITS,
    }
    return Row(implementation=implementation, **{**settings, **fields})


def report(*rows, left_out=()):
    machine = {
        "date": "2026-01-02",
        "device": "Imagined CPU",
        "processor": "Imagined CPU",
        "threads": 2,
        "memory_bytes": 1 << 34,
        "python": "3.11.0",
        "torch": "2.13.0",
        "hubert_fast": "0.1",
        "commit": None,
    }
    left_out = [each if isinstance(each, LeftOut) else LeftOut(*each) for each in left_out]
    return Report(machine, {"minutes": 5.0}, {"float32": LIMITS}, list(rows), left_out)
