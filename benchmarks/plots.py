"""A report's pictures: throughput, memory, where a step's time goes, and how throughput scales. One PNG each."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hubert_fast.pretrain import atomic

from . import quantities
from .report import Report, Row
from .table import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers who are colour-blind. Blues are ours, the rest is others'.
_OUR_COLOURS = ("#0072B2", "#56B4E9", "#004B75")
_OTHER_COLOURS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#8C6D31", "#999999", "#444444")
_STAGE_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#F0E442", "#CC79A7", "#8C6D31", "#BBBBBB")
_MARKERS = "osD^vPX*"
_TEXT, _GREY, _PALE = "#222222", "#666666", "#DDDDDD"
_DOTS_PER_INCH = 150

_AXES = {
    "batch seconds": "seconds of audio a batch",
    "utterance seconds": "seconds of audio an utterance",
    "classes": "classes",
}


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw ``folder/{throughput,memory,stages,scaling}.png``; a picture without data is left out, an old one removed.

    Returns:
        the paths of those drawn.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = []
    for name, make in _PICTURES.items():
        path = Path(folder) / f"{name}.png"
        figure = make(report)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        FigureCanvasAgg(figure)
        figure.supxlabel(_caption(report), fontsize=8, color=_GREY)
        atomic.write_with(path, partial(figure.savefig, dpi=_DOTS_PER_INCH, format="png"))
        drawn.append(path)
    return drawn


def throughput(report: Report) -> Figure | None:
    """Bars of seconds of audio per second, a panel a case and dtype; lines over their ends span the spread."""
    rows = [row for row in report.rows if row.kind in ("step", "inference") and row.throughput is not None]

    def bar(axes: Axes, row: Row, place: int, colour: str) -> tuple[float, str]:
        speed, audio = row.throughput, row.audio_seconds
        spread = [[speed - audio / row.seconds.p80], [audio / row.seconds.p20 - speed]]
        axes.barh(place, speed, color=colour, xerr=spread, error_kw={"ecolor": _TEXT, "elinewidth": 1, "capsize": 2})
        return audio / row.seconds.p20, quantities.digits(speed)

    return _bars(rows, "Throughput", "seconds of audio per second (longer is better)", bar)


def memory(report: Report) -> Figure | None:
    """Bars of bytes: what is held between calls pale, what a call takes beyond it in colour."""
    rows = [row for row in report.rows if row.kind == "step" and row.step_bytes is not None]
    gib = 2.0**30

    def bar(axes: Axes, row: Row, place: int, colour: str) -> tuple[float, str]:
        step = row.step_bytes / gib
        held = max(0.0, (row.peak_bytes or row.step_bytes) / gib - step)
        axes.barh(place, step, color=colour)
        axes.barh(place, held, left=step, color=_PALE)
        return step + held, f"{quantities.digits(step)} of {quantities.digits(step + held)}"

    return _bars(rows, "Memory of a step", "GiB: the step's own, and (pale) what is held between steps", bar)


def stages(report: Report) -> Figure | None:
    """Stacked bars of seconds by stage."""
    rows = [row for row in report.rows if row.stages]
    names = list(dict.fromkeys(name for row in rows for name in row.stages))
    colours = {name: _STAGE_COLOURS[i % len(_STAGE_COLOURS)] for i, name in enumerate(names)}

    def bar(axes: Axes, row: Row, place: int, colour: str) -> tuple[float, str]:
        left = 0.0
        for name in (each for each in names if each in row.stages):
            axes.barh(
                place, row.stages[name], left=left, color=colours[name], edgecolor="white", linewidth=0.6, label=name
            )
            left += row.stages[name]
        return left, quantities.seconds(left)

    figure = _bars(rows, "Where the time of a step goes", "seconds (shorter is better)", bar)
    if figure is not None:
        _legend(figure)
    return figure


def scaling(report: Report) -> Figure | None:
    """Lines of throughput along each axis, a column an axis and a row a dtype; bands span the spread."""
    rows = [row for row in report.rows if row.kind == "scaling" and row.throughput is not None]
    if not rows:
        return None
    axis_names = _in_order(row.shape["axis"] for row in rows)
    dtypes = _in_order(row.dtype for row in rows)
    figure, panels = _panels(len(dtypes), len(axis_names), width=4.6, height=3.6)
    colours = _colours(rows)
    for i, dtype in enumerate(dtypes):
        for j, axis in enumerate(axis_names):
            chosen = [row for row in rows if row.dtype == dtype and row.shape["axis"] == axis]
            _style(panels[i][j], grid="both")
            panels[i][j].set(title=dtype, xlabel=_AXES.get(axis, axis), ylabel="seconds of audio per second")
            _lines(panels[i][j], chosen, colours)
    figure.suptitle("How throughput of a training step scales", fontsize=14, color=_TEXT)
    _legend(figure)
    return figure


_PICTURES: dict[str, Callable[[Report], Figure | None]] = {
    "throughput": throughput,
    "memory": memory,
    "stages": stages,
    "scaling": scaling,
}


def _bars(
    rows: Sequence[Row], title: str, label: str, bar: Callable[[Axes, Row, int, str], tuple[float, str]]
) -> Figure | None:
    """A panel a case (down) and dtype (across) with a bar an implementation, which ``bar`` draws at a place in a colour; it
    returns where the bar ends and what to write there."""
    if not rows:
        return None
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.case, {}).setdefault(row.dtype, []).append(row)
    dtypes = _in_order(row.dtype for row in rows)
    most = max(len(chosen) for by_dtype in groups.values() for chosen in by_dtype.values())
    figure, panels = _panels(len(groups), len(dtypes), width=6.2, height=0.9 + 0.36 * max(most, 2))
    colours = _colours(rows)
    for line, (case, by_dtype) in zip(panels, groups.items()):
        for axes, dtype in zip(line, dtypes):
            chosen = by_dtype.get(dtype, [])
            if not chosen:
                axes.set_axis_off()
                continue
            _style(axes, grid="x")
            axes.set_title(f"{case}, {dtype}", loc="left", fontsize=11, color=_TEXT)
            ends = [bar(axes, row, place, colours[row.implementation]) for place, row in enumerate(chosen)]
            _write_on_bars(axes, [row.implementation for row in chosen], ends)
    for column in zip(*panels):
        [axes for axes in column if axes.axison][-1].set_xlabel(label)
    figure.suptitle(title, fontsize=14, color=_TEXT)
    return figure


def _write_on_bars(axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, str]]) -> None:
    """The name before each bar, its number behind it; ours in bold."""
    axes.set_xlim(0, 1.18 * max(end for end, _ in ends))
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.set_yticks(range(len(names)), names)
    for place, (name, tick, (end, text)) in enumerate(zip(names, axes.get_yticklabels(), ends)):
        font = {"color": _TEXT, "fontsize": 9, "weight": "bold" if _is_ours(name) else "normal"}
        tick.set(**font)
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", **font)


def _lines(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for place, name in enumerate(colours):
        points = sorted((row for row in rows if row.implementation == name), key=lambda row: row.shape["value"])
        if not points:
            continue
        values = [row.shape["value"] for row in points]
        ours = _is_ours(name)
        axes.fill_between(
            values,
            [row.audio_seconds / row.seconds.p80 for row in points],
            [row.audio_seconds / row.seconds.p20 for row in points],
            color=colours[name],
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            values,
            [row.throughput for row in points],
            color=colours[name],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5.5 if ours else 4.5,
            linewidth=2.6 if ours else 1.5,
            zorder=3 if ours else 2,
            label=name,
        )
    values = sorted({row.shape["value"] for row in rows})
    if values and values[0] > 0 and values[-1] / values[0] >= 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{each:g}" for each in values])
    axes.set_ylim(bottom=0)


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """Of each implementation."""
    ours, others = itertools.cycle(_OUR_COLOURS), itertools.cycle(_OTHER_COLOURS)
    names = _in_order(row.implementation for row in rows)
    return {name: next(ours if _is_ours(name) else others) for name in names}


def _is_ours(implementation: str) -> bool:
    return implementation.startswith(OURS)


def _in_order(items: Iterable) -> list:
    return list(dict.fromkeys(items))


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Inches are of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.8, height * rows + 1.0), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(h_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _style(axes: Axes, *, grid: str) -> None:
    axes.grid(True, axis=grid, color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_major_formatter("{x:,.10g}")
    for each in (axes.xaxis.label, axes.yaxis.label):
        each.set(fontsize=10, color=_TEXT)


def _legend(figure: Figure) -> None:
    """Beside the panels, each name once."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)


def _caption(report: Report) -> str:
    """Device, versions and date."""
    machine = report.machine
    on_cpu = any(row.device == "cpu" for row in report.rows) and "threads" in machine
    threads = [f"{machine['threads']} threads"] if on_cpu else []
    # Variants of an implementation have its name and some words more.
    libraries = [f"{row.implementation.split()[0]} {row.version}" for row in report.rows if row.kind != "operator"]
    parts = [machine["device"], *threads, f"torch {machine['torch']}", *_in_order(libraries), machine["date"]]
    return textwrap.fill(" · ".join(each.replace(" ", "\xa0") for each in parts), 110)  # a part stays on its line
