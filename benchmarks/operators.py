"""Every operator beside its alternatives and its floor, as rows of a report."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Optional

import torch

from hubert_fast.backend import BackendError

from .limits import measure_limits
from .lost_device import answers, first_line, lost, why_no_more
from .ops.calls import Calls, WrongResult
from .ops.case import OURS, OperatorCase
from .ops.turns import in_turn, peak_bytes
from .report import LeftOut, Report, Row, Seconds, dtype_name
from .sizes import Size, size_on

# What takes most of a step first.
OPERATORS = (
    "conv_frontend",
    "masked_attention",
    "cosine_cross_entropy",
    "feed_forward",
    "positional_conv",
    "bias_gelu_dropout",
    "residual_layer_norm",
    "bias_dropout_residual",
    "mask_fill",
    "cosine_logits",
    "span_mask",
)

# Timed calls of each implementation, and the seconds of a case after which no more are begun.
_REPEATS, _SECONDS = 20, 2.0


def cases_of(operator: str, size: Size, dtype: torch.dtype, device: str) -> list[OperatorCase]:
    """Its cases under its name, the most important first. Nothing is drawn or computed yet."""
    module = importlib.import_module(f".ops.bench_{operator}", __package__)
    return [replace(case, name=f"{operator}: {case.name}") for case in module.cases(size, dtype, device)]


def measure(
    report: Report,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    size: str,
    seconds_left: Callable[[], float],
    progress: Callable[[str], None],
    operators: Optional[Sequence[str]] = None,
    compiled: Optional[bool] = None,
) -> None:
    """Append a row for each implementation of each case, and what was left out; limits where the report has none yet.

    Args:
        size: whose shapes are taken: "base", "large", "xlarge".
        seconds_left: no case is begun once this is 0. Every operator's first case comes before any operator's second.
        progress: told the case that begins.
        operators: names; None: all.
        compiled: whether torch.compile takes part, after all others; None: on a GPU.

    Raises:
        DeviceLost: an implementation made the device unusable; what was measured before is in the report, and what is there
            is not measured again.
    """
    device = torch.device(device).type
    if dtype_name(dtype) not in report.limits:
        report.limits[dtype_name(dtype)] = measure_limits(device, dtype)
    of_operators = [cases_of(name, size_on(device, size), dtype, device) for name in operators or OPERATORS]
    # The first case of every operator, then the second of every one, ...
    cases = [each for turn in zip_longest(*of_operators) for each in turn if each is not None]
    _measure_in_time(report, cases, False, seconds_left, progress)
    # Compiling a case takes longer than measuring all of an operator, so it comes when everything else is there.
    if device == "cuda" if compiled is None else compiled:
        _measure_in_time(report, cases, True, seconds_left, progress)


def _measure_in_time(
    report: Report,
    cases: Sequence[OperatorCase],
    with_compiler: bool,
    seconds_left: Callable[[], float],
    progress: Callable[[str], None],
) -> None:
    """Those implementations of ``cases`` that are compiled, or those that are not; what there was no time for is left out."""
    skipped: Counter[tuple[str, str]] = Counter()
    for case in cases:
        settled = report.settled("operator", case.name, case.dtype_name)
        names = [name for name, side in case.sides.items() if side.compiled is with_compiler and name not in settled]
        if names and seconds_left() <= 0.0:
            skipped[_operator(case), case.dtype_name] += 1
        elif names:
            progress(f"{case.name}{', compiled' if with_compiler else ''}, {case.dtype_name}")
            _measure(report, case, names)
    report.left_out += [
        LeftOut(operator, "torch.compile" if with_compiler else "all", f"no time was left for {count} cases in {dtype}")
        for (operator, dtype), count in skipped.items()
    ]


def _measure(report: Report, case: OperatorCase, names: Sequence[str]) -> None:
    calls = Calls(case)
    made: dict[str, Callable[[int], Any]] = {}
    known: dict[str, dict[str, Any]] = {}  # what a row has beside times
    for name in names:
        reason = why_no_more(report, name, lambda each: each.startswith(f"{_operator(case)}: "))
        if reason is not None:
            report.left_out.append(LeftOut(case.title, name, reason))
            continue
        try:
            call, error = calls.make(name)
            known[name] = {"step_bytes": peak_bytes(call, case.device), "check": {"results": error}}
            made[name] = call
        except Exception as error:  # one implementation that fails must not keep the others from being measured
            _leave_out(report, case, name, error)
    taken, errors = in_turn(made, case.device, repeats=_REPEATS, seconds=_SECONDS)
    rows = [
        Row(
            kind="operator",
            case=case.name,
            implementation=name,
            version=case.sides[name].version,
            device=case.device,
            dtype=case.dtype_name,
            shape=case.shape,
            seconds=Seconds.of(seconds),
            flops=case.least.flops,
            bytes=case.least.bytes,
            limits=None if case.on_host else report.limits[case.dtype_name],
            **known[name],
        )
        for name, seconds in taken.items()
    ]
    same = [i for i, row in enumerate(report.rows) if (row.case, row.dtype) == (case.name, case.dtype_name)]
    end = same[-1] + 1 if same else len(report.rows)
    report.rows[end:end] = rows  # beside those of the same case that are there already
    for name, error in reversed(errors.items()):  # a device that was lost was lost by the last
        _leave_out(report, case, name, error)


def _leave_out(report: Report, case: OperatorCase, name: str, error: Exception) -> None:
    rejected = isinstance(error, WrongResult) or (name == OURS and not isinstance(error, BackendError))
    if not answers(case.device):
        raise lost(report, case.title, name, error, rejected=rejected) from error
    report.left_out.append(LeftOut(case.title, name, first_line(error), rejected))


def _operator(case: OperatorCase) -> str:
    return case.name.partition(": ")[0]
