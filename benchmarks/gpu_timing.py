"""Timing on a GPU: events around each call behind a full queue, sides in turn, inputs that do not lie in the cache.

The limits that results stand beside are measured in the same run: bandwidth is that of a large copy, bytes read and written;
the rate is that of an 8192 x 8192 x 8192 product of random numbers in the same dtype.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from benchmarks.machine import describe


class Limits(NamedTuple):
    """What the card does at best."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Work:
    """The least that an operation has to do: each input read once and each output written once, and its arithmetic."""

    bytes: float
    flops: float = 0.0

    def floor(self, limits: Limits) -> float:
        """Seconds."""
        return max(self.bytes / limits.bytes_per_second, self.flops / limits.flops_per_second)


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU, and torch finds none")


def describe_gpu() -> dict[str, Any]:
    import triton

    return describe() | {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def limits(dtype: torch.dtype) -> Limits:
    """Measured now, on this card."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / median(lambda: target.copy_(source), 10)
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return Limits(bandwidth, 2 * size**3 / median(lambda: left @ right, 10))


def copies(bytes_each: float) -> int:
    """How many sets of inputs, used in turn, do not fit into the L2 cache together."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-3 * cache // max(1, int(bytes_each))))


def median(step: Callable[[], Any], repeats: int) -> float:
    """Seconds of ``step`` on the device; the first two calls are not timed."""
    return statistics.median([_seconds(step) for _ in range(repeats + 2)][2:])


def in_turn(
    sides: Mapping[str, Callable[[int], Any]], work: Mapping[str, Work] | Work, limit: Limits, *, repeats: int = 30
) -> list[dict[str, Any]]:
    """Each side's time, memory and share of the limit, as rows of the result file.

    Args:
        sides: name -> ``call(i)``, which works on the i-th set of inputs (take it modulo their number).
        work: the least that the operation has to do; of each side where they differ.
        repeats: timed calls of each side; two before them are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = {name: _peak_bytes(lambda call=call: call(0)) for name, call in sides.items()}
    for repeat in range(repeats + 2):
        for name, call in sides.items():
            taken = _seconds(lambda call=call, repeat=repeat: call(repeat))
            if repeat >= 2:
                seconds[name].append(taken)
    return [
        _row(name, seconds[name], memory[name], work if isinstance(work, Work) else work[name], limit) for name in sides
    ]


def _row(name: str, seconds: list[float], memory: int, work: Work, limit: Limits) -> dict[str, Any]:
    middle = statistics.median(seconds)
    fifths = statistics.quantiles(seconds, n=5)
    return {
        "implementation": name,
        "seconds": {"median": middle, "p20": fifths[0], "p80": fifths[-1]},
        "peak_bytes": memory,
        "bytes_per_second": work.bytes / middle,
        "flops_per_second": work.flops / middle,
        "floor_seconds": work.floor(limit),
        "share_of_limit": work.floor(limit) / middle,
    }


def write(path: Optional[Path], operator: str, cases: list[dict[str, Any]], limit: Limits) -> None:
    """Print ``cases`` ("case": a description, "rows": of `in_turn`), and write them to ``path`` where given."""
    report = {"machine": describe_gpu(), "operator": operator, "limits": limit._asdict(), "cases": cases}
    _print(report)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def _print(report: dict[str, Any]) -> None:
    limit = report["limits"]
    copy, product = limit["bytes_per_second"] / 1e12, limit["flops_per_second"] / 1e12
    print(f"{report['operator']} on {report['machine']['device']}: copy {copy:.2f} TB/s, product {product:.0f} TFLOP/s")
    for case in report["cases"]:
        print(case["case"])
        for row in case["rows"]:
            seconds = row["seconds"]
            print(
                f"  {1e6 * seconds['median']:9.1f} us (p20 {1e6 * seconds['p20']:.1f}, p80 {1e6 * seconds['p80']:.1f}), floor "
                f"{1e6 * row['floor_seconds']:8.1f} ({row['share_of_limit']:4.0%}), {row['bytes_per_second'] / 1e12:5.2f} TB/s, "
                f"{row['flops_per_second'] / 1e12:6.1f} TFLOP/s, {row['peak_bytes'] / 1e6:8.1f} MB  {row['implementation']}"
            )


def _seconds(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # tens of milliseconds of queue, behind which the host gets ahead of the device
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_bytes(step: Callable[[], Any]) -> int:
    """Bytes that ``step`` holds at most beyond what is held before it."""
    step()  # compiles, tunes and fills caches
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
