"""Timing of operators: implementations in turn, on a GPU behind a full queue, so that drift meets all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..clock import device_seconds
from ..lost_device import answers
from ..memory import allocated_peak_of

_UNTIMED = 1  # call of each implementation, after those by which it was checked and warmed up
_FEWEST = 3  # timed calls of each, however long they take

Call = Callable[[int], Any]


def in_turn(
    calls: Mapping[str, Call], device: str, *, repeats: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of each timed call of each implementation, and what the others raised.

    Args:
        calls: name -> ``call(i)``, which works on the i-th set of inputs.
        device: whose time is taken.
        repeats: timed calls of each.
        seconds: of timed turns, after which no more begin, once each has three timed calls.

    Returns:
        (times, errors), by name. An implementation is in one of them, and where its error leaves a device that does not
        answer, those that had fewer than three calls are in neither.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    started = time.perf_counter()
    for turn in range(_UNTIMED + repeats):
        if turn <= _UNTIMED:
            started = time.perf_counter()
        elif turn >= _UNTIMED + _FEWEST and time.perf_counter() - started > seconds:
            break
        first = turn % max(1, len(taken))  # what runs first finds less in cache
        for name in [*taken][first:] + [*taken][:first]:
            try:
                elapsed = device_seconds(partial(calls[name], turn), device)
            except Exception as error:  # one implementation that fails must not keep the others from being measured
                errors[name] = error
                del taken[name]
                if not answers(device):
                    return {each: times for each, times in taken.items() if len(times) >= _FEWEST}, errors
            else:
                if turn >= _UNTIMED:
                    taken[name].append(elapsed)
    return taken, errors


def peak_bytes(call: Call, device: str) -> int:
    """Bytes that a call takes at most beyond what is held before it."""
    if torch.device(device).type == "cuda":
        return allocated_peak_of(lambda: call(0), device)
    return _cpu_peak(call)


def _cpu_peak(call: Call) -> int:
    """What PyTorch's allocator was asked for, as its profiler saw it; what libraries allocate for themselves is not in it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call(0)
    held = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
