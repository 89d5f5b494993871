"""Every operator beside its alternatives and its floor, as rows of a report."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Optional

import torch

from hubert_fast.backend import BackendError

from .limits import measure_limits
from .lost_device import answers, first_line, lost, why_no_more
from .ops.calls import Calls, WrongResult
from .ops.case import OURS, OperatorCase
from .ops.turns import in_turn, peak_bytes
from .report import LeftOut, Limits, Report, Row, Seconds
from .sizes import Size, size_on

# What takes most of a step first.
OPERATORS = (
    "conv_frontend",
    "masked_attention",
    "cosine_cross_entropy",
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
    """Its cases, the most important first. Nothing is drawn or computed yet."""
    module = importlib.import_module(f".ops.bench_{operator}", __package__)
    return list(module.cases(size, dtype, device))


def measure(
    report: Report,
    *,
    device: torch.device | str,
    dtypes: Sequence[str],
    size: str,
    seconds_left: Callable[[], float],
    progress: Callable[[str], None],
    operators: Optional[Sequence[str]] = None,
    compiled: Optional[bool] = None,
) -> None:
    """Append a row for each implementation of each case, and what was left out; limits where the report has none yet.

    Args:
        dtypes: names, as "float32"; one after the other.
        size: whose shapes are taken: "base", "large", "xlarge".
        seconds_left: no case is begun once this is 0. Every operator's first case comes before any operator's second.
        progress: told the case that begins.
        operators: names; None: all.
        compiled: whether torch.compile takes part, after all others; None: on a GPU.

    Raises:
        ValueError: for an unknown operator or size.
        DeviceLost: an implementation made the device unusable; what was measured before is in the report, and what is there
            is not measured again.
    """
    device, names = torch.device(device).type, OPERATORS if operators is None else tuple(operators)
    unknown = [name for name in names if name not in OPERATORS]
    if unknown:
        raise ValueError(f"operators must be among {list(OPERATORS)}; got {unknown}")
    compiled = device == "cuda" if compiled is None else compiled
    for dtype in dtypes:
        if dtype not in report.limits:
            report.limits[dtype] = measure_limits(device, getattr(torch, dtype))
        cases = list(_by_importance(names, size_on(device, size), getattr(torch, dtype), device))
        # Compiling a case takes longer than measuring all of an operator, so it comes when everything else is there.
        for with_compiler in (False, True) if compiled else (False,):
            _measure_in_time(
                report, cases, with_compiler, seconds_left, lambda text, dtype=dtype: progress(f"{text}, {dtype}")
            )


def _measure_in_time(
    report: Report,
    cases: Sequence[tuple[str, OperatorCase]],
    with_compiler: bool,
    seconds_left: Callable[[], float],
    progress: Callable[[str], None],
) -> None:
    """Those implementations of ``cases`` that are compiled, or those that are not; what there was no time for is left out."""
    skipped: dict[tuple[str, str], int] = {}
    for operator, case in cases:
        settled = report.settled("operator", f"{operator}: {case.name}", case.dtype_name)
        names = [name for name, side in case.sides.items() if side.compiled is with_compiler and name not in settled]
        if names and seconds_left() <= 0.0:
            skipped[operator, case.dtype_name] = skipped.get((operator, case.dtype_name), 0) + 1
        elif names:
            progress(f"{operator}: {case.name}" + (", compiled" if with_compiler else ""))
            with fastest_convolutions():
                _measure(report, operator, case, names)
    report.left_out += [
        LeftOut(operator, "torch.compile" if with_compiler else "all", f"no time was left for {count} cases in {dtype}")
        for (operator, dtype), count in skipped.items()
    ]


def _by_importance(
    names: Iterable[str], size: Size, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, OperatorCase]]:
    """The first case of every operator, then the second of every one, ..."""
    for turn in zip_longest(*([(name, case) for case in cases_of(name, size, dtype, device)] for name in names)):
        yield from (each for each in turn if each is not None)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN takes its fastest algorithms, whatever shapes come later."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _measure(report: Report, operator: str, case: OperatorCase, names: Sequence[str]) -> None:
    calls = Calls(case)
    made: dict[str, Callable[[int], Any]] = {}
    known: dict[str, tuple[float, int]] = {}  # by how much results are off, and bytes of a call
    for name in names:
        reason = why_no_more(report, name, lambda each: each.startswith(f"{operator}: "))
        if reason is not None:
            report.left_out.append(LeftOut(_title(operator, case), name, reason))
            continue
        try:
            call, error = calls.make(name)
            known[name], made[name] = (error, peak_bytes(call, case.device)), call
        except Exception as error:  # one implementation that fails must not keep the others from being measured
            _leave_out(report, operator, case, name, error)
    taken, errors = in_turn(made, case.device, repeats=_REPEATS, seconds=_SECONDS)
    limits = report.limits[case.dtype_name]
    rows = [row_of(operator, case, name, Seconds.of(seconds), limits, *known[name]) for name, seconds in taken.items()]
    place = (f"{operator}: {case.name}", case.dtype_name)
    same = [number for number, row in enumerate(report.rows) if (row.case, row.dtype) == place]
    end = same[-1] + 1 if same else len(report.rows)
    report.rows[end:end] = rows  # beside those of the same case that are there already
    for name, error in reversed(errors.items()):  # a device that was lost was lost by the last
        _leave_out(report, operator, case, name, error)


def _leave_out(report: Report, operator: str, case: OperatorCase, name: str, error: Exception) -> None:
    rejected = isinstance(error, WrongResult) or (name == OURS and not isinstance(error, BackendError))
    if not answers(case.device):
        raise lost(report, _title(operator, case), name, error, rejected=rejected) from error
    report.left_out.append(LeftOut(_title(operator, case), name, first_line(error), rejected))


def _title(operator: str, case: OperatorCase) -> str:
    """The case as entries of what was left out name it."""
    return f"{operator}: {case.name}, {case.dtype_name}"


def row_of(
    operator: str,
    case: OperatorCase,
    name: str,
    seconds: Seconds,
    limits: Limits,
    error: float,
    step_bytes: Optional[int] = None,
) -> Row:
    """Of implementation ``name``, whose results were off by ``error`` of the norm."""
    return Row(
        kind="operator",
        case=f"{operator}: {case.name}",
        implementation=name,
        version=case.sides[name].version,
        device=case.device,
        dtype=case.dtype_name,
        shape=case.shape,
        seconds=seconds,
        step_bytes=step_bytes,
        flops=case.least.flops,
        bytes=case.least.bytes,
        limits=None if case.on_host else limits,
        check={"results": error},
    )
