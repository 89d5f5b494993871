"""Our step under PyTorch's profiler: kernels by time, by part of the step beside its prediction, and what the GPU waits for."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks import stages
from benchmarks.batches import Batch
from benchmarks.clock import synchronize
from benchmarks.peers.peer import Setting
from benchmarks.predictions import PARTS, part_of
from benchmarks.training import TrainingStep
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import Facts

_STEPS = 2
_KERNELS = 16  # that are noted, of those that take most time
_ROWS = 60  # of the tables on disk

# Calls of the driver that a step is to have few of, or none.
_CALLS = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaMemcpy",
    "cudaMemset",
    "cudaStreamSynchronize",
    "cudaMalloc",
    "cudaGraphLaunch",
)


def profile(facts: Facts, step: TrainingStep, batches: Sequence[Batch], chosen: Setting, seconds: float) -> None:
    """Note where a step's time goes.

    Args:
        seconds: of a step that is not profiled.
    """
    with profiler(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU) as run:
        for batch in batches[:_STEPS]:
            step(batch, chosen.dtype)
        synchronize(DEVICE)
    events = run.events()
    name = f"{chosen.architecture.name}-{str(chosen.dtype).removeprefix('torch.')}"
    facts.note("profile", model=name, steps=_STEPS, step_ms=1e3 * seconds, **busy(events), calls=calls(events))
    for part, (launches, ms) in by_part(events).items():
        facts.note("part", name=part, launches=launches / _STEPS, ms=ms / _STEPS)
    # Kernels whose launch has no operator around it are in no part.
    total = sum(each.time_range.elapsed_us() for each in events if _is_kernel(each)) / 1e3 / _STEPS
    facts.note("part", name="sum of all kernels", launches=sum(map(_is_kernel, events)) / _STEPS, ms=total)
    averages = run.key_averages()
    by_time = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    tables = [
        averages.table(sort_by=key, row_limit=_ROWS, max_name_column_width=110)
        for key in (by_time, "self_cpu_time_total")
    ]
    (facts.out / f"profile-{name}.txt").write_text("\n".join(tables))
    kernels = [each for each in averages if _is_kernel(each)] if ON_GPU else averages
    for each in sorted(kernels, key=lambda each: getattr(each, by_time), reverse=True)[:_KERNELS]:
        facts.note("kernel", name=each.key[:90], calls=each.count / _STEPS, ms=getattr(each, by_time) / _STEPS / 1e3)
    split = stages.split(step.model, lambda: step(batches[0], chosen.dtype), chosen.device)
    facts.note("stages", **{stage: round(1e3 * each, 3) for stage, each in split.items()})


def busy(events: Iterable[FunctionEvent]) -> dict[str, Any]:
    """How long the GPU works, of the time from its first kernel to its last, and the gaps between kernels."""
    spans = sorted((each.time_range.start, each.time_range.end) for each in events if _is_kernel(each))
    if not spans:
        return {"kernels": 0}
    working, gaps, end = 0.0, [], spans[0][0]
    for start, stop in spans:
        gaps.append(max(0.0, start - end))
        working += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    return {
        "kernels": len(spans),
        "busy_ms": working / 1e3,
        "whole_ms": whole / 1e3,
        "busy_share": working / whole if whole else None,
        "gaps_over_20_us": sum(gap > 20 for gap in gaps),
        "largest_gap_us": max(gaps),
    }


def calls(events: Iterable[FunctionEvent]) -> dict[str, int]:
    """How often each function of the driver was called."""
    counted = collections.Counter(each.name for each in events)
    return {prefix: sum(count for name, count in counted.items() if name.startswith(prefix)) for prefix in _CALLS}


def by_part(events: Iterable[FunctionEvent]) -> dict[str, tuple[int, float]]:
    """Kernels and their milliseconds by part of the step, as `benchmarks.predictions` divides it."""
    found = {part.name: (0, 0.0) for part in PARTS}
    for event in events:
        if event.device_type != DeviceType.CPU or not event.kernels:
            continue
        name = part_of([each.name for each in _around(event)]).name
        # A scope has a kernel of its own name, which stands for all that run in it.
        durations = [each.duration for each in event.kernels if each.name != event.name]
        launches, ms = found[name]
        found[name] = launches + len(durations), ms + sum(durations) / 1e3
    return found


def _around(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_kernel(event: FunctionEvent) -> bool:
    """Copies count; scopes, which the profiler shows on the GPU too, do not."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
