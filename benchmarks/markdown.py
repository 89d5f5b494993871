"""A report as Markdown: what the README shows of it. Every number comes from the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .quantities import digits, seconds, size
from .report import Report, Row
from .table import NOTHING, OURS, fastest_other, left_out, limits, speedup, speedup_over_others, whole, written

LEGEND = """\
Medians, and the 20th and 80th percentile, of calls of all implementations in one process, in turn where memory holds them
together; the first call of each is not timed. Every call of a case draws the same masks. A step is forward, backward and
optimizer; the same loss from the same weights was checked before anything was timed. Seconds of audio are without padding.
`x torchaudio` is torchaudio's median over this one's in the same case, `x fastest other` that of the fastest that is not ours.
An operator's alternatives count where they err at most 1.5 times as much as ours, dropout off; – where none does.
Memory is the peak, weights, gradients and optimizer included. MFU is the model's FLOPs, counted by formula, over the rate of a
large matrix product in that dtype in the same run; what the loss does not need counts too, though ours leaves some of it out.
LayerDrop is off, dropout is on; the audio is noise. On a GPU float32 means products and convolutions in TF32 on all sides.

`hubert_fast` is the objective, `hubert_fast swapped in` what changing the import alone gives, `hubert_fast graph` its
`GraphedStep`. `torchaudio` runs its recipe, `torchaudio masked only` leaves out the logits that the recipe's loss does not
use."""


def section(report: Report, name: str) -> str:
    """The report in the result file ``name`` as a section of the README, with its device, versions and date."""
    of_kind = {kind: [row for row in report.rows if row.kind == kind] for kind in _PARTS}
    parts = [_heading(report, name), *(part(of_kind[kind]) for kind, part in _PARTS.items() if of_kind[kind])]
    if report.left_out:
        parts.append(_folded("What was left out, and why", left_out(report.left_out)))
    return "\n\n".join(parts)


def _heading(report: Report, name: str) -> str:
    machine = report.machine
    cpu = report.rows[0].device == "cpu"
    threads = f", {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}" if cpu else ""
    names = ("torch", "python", "cuda", "triton", "hubert_fast")
    software = {name: machine[name] for name in names if machine.get(name)}
    software |= {row.implementation.split()[0]: row.version for row in report.rows if row.kind != "operator"}
    commit = f" (commit {machine['commit']})" if machine.get("commit") else ""
    return (
        f"### {machine['device']}{threads}, {machine['date']}\n\n"
        f"{', '.join(f'{each} {version}' for each, version in software.items())}{commit}. "
        f"The device's limits, measured in the same run, in {limits(report)}. "
        f"All of it: [`benchmarks/results/{name}`](benchmarks/results/{name})."
    )


def _whole(rows: list[Row], title: str, call: str) -> str:
    head, *cells = whole(rows, call)
    for each in cells:
        each[2] = f"**{each[2]}**" if each[2] == OURS else each[2]
    return f"{title}:\n\n{_table(head, cells, left=3)}"


def _scaling(rows: list[Row]) -> str:
    """A table for each axis and dtype: how cost grows."""
    grown: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grown.setdefault((row.shape["axis"], row.dtype), []).append(row)
    tables = []
    for (axis, dtype), points in grown.items():
        names = list(dict.fromkeys(row.implementation for row in points))
        cells = []
        for value in sorted({row.shape["value"] for row in points}):
            at = {row.implementation: row for row in points if row.shape["value"] == value}
            ratio = speedup(at[OURS], at.values()) if OURS in at else None
            cells.append([f"{value:,g}", *(_point(at.get(name)) for name in names), written(ratio, "{:.2f}".format)])
        tables.append(_table([f"{axis}, {dtype}", *names, "ratio"], cells, left=0))
    return _folded("How the cost of a step grows: audio s per s, and memory", "\n\n".join(tables))


def _point(row: Row | None) -> str:
    if row is None or row.throughput is None:
        return NOTHING
    memory = "" if row.peak_bytes is None else f", {size(row.peak_bytes)}"
    return digits(row.throughput) + memory


def _operators(rows: list[Row]) -> str:
    """Ours beside the fastest of the others."""
    head = ["operator", "dtype", "hubert_fast", "fastest other", "", "ratio", "floor", "of the floor"]
    cells = []
    for row in (row for row in rows if row.implementation == OURS):
        best = fastest_other(row, rows)
        cells.append(
            [
                row.case,
                row.dtype,
                seconds(row.seconds.median),
                NOTHING if best is None else best.implementation,
                NOTHING if best is None else seconds(best.seconds.median),
                written(speedup_over_others(row, rows), "{:.2f}".format),
                written(row.floor_seconds, seconds),
                written(row.share_of_limit, "{:.0%}".format),
            ]
        )
    return _folded("Operators, each beside its fastest alternative and its floor", _table(head, cells, left=2))


def _folded(title: str, contents: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{contents}\n\n</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """The first ``left`` columns are aligned left, the others right; `NOTHING` is an en dash."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    shown = [["–" if cell == NOTHING else cell.replace("|", "/") for cell in cells] for cells in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in shown)


_PARTS: dict[str, Callable[[list[Row]], str]] = {
    "step": partial(_whole, title="Training steps", call="a step"),
    "inference": partial(_whole, title="Inference (`extract_features`)", call="a batch"),
    "scaling": _scaling,
    "operator": _operators,
}
