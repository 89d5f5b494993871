"""A report as text: one table for whole steps and inference, one for operators, and what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .quantities import digits, seconds, size
from .report import NO_TIME, LeftOut, Report, Row

_BASELINE, OURS = "torchaudio", "hubert_fast"
_LEGEND = (
    "error: the largest of a result's or gradient's differences from PyTorch's in float32, relative to its norm, dropout off.",
    "x best other: of alternatives that err at most 1.5 times as much as ours; -: there is none.",
)
NOTHING = "-"  # in the place of a number that there is none of; a terminal may know no en dash


def render(report: Report) -> str:
    """What a terminal shows after a run."""
    parts = [_heading(report)]
    for kinds in (("step", "inference"), ("scaling",), ("operator",)):
        rows = [row for row in report.rows if row.kind in kinds]
        if rows:
            parts.append(_operators(rows) if kinds == ("operator",) else columns(whole(rows), left=(0, 1, 2)))
    if report.left_out:
        parts.append(f"left out (more --minutes where it was no time):\n{left_out(report.left_out)}")
    return "\n\n".join(parts)


def columns(cells: Sequence[Sequence[str]], *, left: Iterable[int] = (0,)) -> str:
    """Rows of text under each other; columns in ``left`` are aligned left, the others right."""
    left = set(left)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    )


def speedup(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as fast as torchaudio ``row`` is in its own case; None without torchaudio."""
    theirs = baseline(row, rows)
    return None if theirs is None else theirs.seconds.median / row.seconds.median


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """torchaudio's in the case of ``row``."""
    return next((each for each in rows if each.implementation == _BASELINE and same_case(each, row)), None)


def fastest_other(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest that is not ours in the case of ``row``, among implementations of an operator that are about as exact."""
    others = [each for each in rows if same_case(each, row) and not each.implementation.startswith(OURS)]
    exact = [each for each in others if _is_as_exact(each, row)]
    return min(exact, key=lambda each: each.seconds.median, default=None)


def _is_as_exact(other: Row, row: Row) -> bool:
    """Whether an operator's results err at most 1.5 times as much as those of ``row``, or as what is rounded once."""
    errors = [_error(each) for each in (other, row)]
    if None in errors:
        return True
    rounding = torch.finfo(getattr(torch, row.dtype)).eps / 4
    return errors[0] <= max(1.5 * errors[1], rounding)


def _error(row: Row) -> float | None:
    return row.check.get("results") if row.kind == "operator" and row.check else None


def speedup_over_others(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as fast one of ours is as the fastest of the others; None for those, and where there is none."""
    best = fastest_other(row, rows) if row.implementation.startswith(OURS) else None
    return None if best is None else best.seconds.median / row.seconds.median


def written(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else form(value)


def same_case(one: Row, other: Row) -> bool:
    return (one.kind, one.case, one.dtype, one.device) == (other.kind, other.case, other.dtype, other.device)


def _heading(report: Report) -> str:
    machine = report.machine
    what = f"{machine['device']}, torch {machine['torch']}, hubert_fast {machine['hubert_fast']}, {machine['date']}"
    return f"{what}\nlimits in {limits(report)}"


def limits(report: Report) -> str:
    """Limits of the device, measured, by dtype."""
    return "; in ".join(
        f"{dtype}: products {digits(each.flops_per_second / 1e12)} TFLOP/s, copies {digits(each.bytes_per_second / 1e9)} GB/s"
        for dtype, each in report.limits.items()
    )


def whole(rows: list[Row], call: str = "median") -> list[list[str]]:
    """Cells of steps or of inference, a line a row, under their head; the first three columns are text.

    Args:
        call: what is timed, as the head has it.
    """
    cells = [
        ["case", "dtype", "implementation", call, "p20 to p80", "audio s per s", "x torchaudio", "x fastest other", "memory",
         "of torchaudio's", "MFU"]
    ]  # fmt: skip
    for number, row in enumerate(rows):
        first = number == 0 or not same_case(rows[number - 1], row)
        cells.append(
            [
                row.case if first else "",
                row.dtype if first else "",
                row.implementation,
                seconds(row.seconds.median),
                f"{seconds(row.seconds.p20)} to {seconds(row.seconds.p80)}",
                written(row.throughput, digits),
                written(speedup(row, rows), "{:.2f}".format),
                written(speedup_over_others(row, rows), "{:.2f}".format),
                written(row.peak_bytes, size),
                written(_share_of_memory(row, rows), "{:.2f}".format),
                written(row.share_of_limit, "{:.0%}".format),
            ]
        )
    return cells


def _share_of_memory(row: Row, rows: Iterable[Row]) -> float | None:
    theirs = baseline(row, rows)
    if theirs is None or not theirs.peak_bytes or row.peak_bytes is None:
        return None
    return row.peak_bytes / theirs.peak_bytes


def _operators(rows: list[Row]) -> str:
    """A line for each case, whose name is long, and under it one for each implementation."""
    cells = [["operator", "dtype", "median", "p20", "p80", "floor", "of limit", "x best other", "error"]]
    titles: dict[int, str] = {}  # by the line before which they stand
    for number, row in enumerate(rows):
        if number == 0 or not same_case(rows[number - 1], row):
            titles[len(cells)] = row.case
        cells.append(
            [
                f"  {row.implementation}",
                row.dtype,
                *(seconds(each) for each in (row.seconds.median, row.seconds.p20, row.seconds.p80)),
                written(row.floor_seconds, seconds),
                written(row.share_of_limit, "{:.0%}".format),
                written(speedup_over_others(row, rows), "{:.2f}".format),
                written(_error(row), "{:.1e}".format),
            ]
        )
    lines = columns(cells, left=(0, 1)).split("\n")
    lines = [f"{titles[number]}\n{line}" if number in titles else line for number, line in enumerate(lines)]
    return "\n".join([*lines, *_LEGEND])


def left_out(entries: Iterable[LeftOut]) -> str:
    """A line for each implementation and reason, because most are left out of many cases for one.

    How much time a case needed and how much was left is in the file alone.
    """
    cases: dict[tuple[str, str], list[str]] = {}
    for each in entries:
        reason = NO_TIME if each.reason.startswith(NO_TIME) else each.reason
        cases.setdefault((each.implementation, reason), []).append(each.case)
    return "\n".join(
        f"- {implementation}: {reason} ({names[0] if len(names) == 1 else f'{len(names)} cases'})"
        for (implementation, reason), names in cases.items()
    )
