"""The pictures of a run: loss, masked accuracy, PNMI per layer, speed. One PNG each, a colour per iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hubert_fast.pretrain import atomic
from hubert_fast.pretrain.run_summary import IterationSummary, iterations

# Okabe and Ito's palette: told apart by readers who are colour-blind, and in grey print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73")
_GREY = "#666666"
_INCHES = (7.6, 3.8)
_DOTS_PER_INCH = 160
_SMOOTH_ABOVE = 200


def write_plots(run: Path) -> dict[str, Path]:
    """Draw ``run/plots/{loss,masked_accuracy,pnmi,speed}.png``; a plot without data is left out, an old one removed.

    Returns:
        the path of each plot drawn, by name.
    """
    found = iterations(run)
    written = {}
    for name, draw in _PLOTS.items():
        path = Path(run) / "plots" / f"{name}.png"
        figure = Figure(figsize=_INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _style(axes)
        if draw(axes, found):
            _legend(axes)
            atomic.write_with(path, partial(figure.savefig, dpi=_DOTS_PER_INCH, format="png"))
            written[name] = path
        else:
            path.unlink(missing_ok=True)
    return written


def draw_loss(axes: Axes, found: Sequence[IterationSummary]) -> bool:
    axes.set(title="Masked loss", xlabel="optimizer step", ylabel="cross-entropy per masked frame (nats)")
    return _draw_training(axes, found, "masked_loss", "valid_masked_loss", scale=1.0)


def draw_masked_accuracy(axes: Axes, found: Sequence[IterationSummary]) -> bool:
    axes.set(title="Masked accuracy", xlabel="optimizer step", ylabel="masked frames predicted right")
    drawn = _draw_training(axes, found, "masked_accuracy", "valid_masked_accuracy", scale=100.0)
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.set_ylim(bottom=0)
    return drawn


def draw_pnmi(axes: Axes, found: Sequence[IterationSummary]) -> bool:
    axes.set(
        title="How much the units know about phones", xlabel="transformer layer", ylabel="PNMI on the held-out part"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    references: dict[tuple[int, float], None] = {}
    for index, iteration in enumerate(found):
        by_layer = {each["layer"]: each for each in (iteration.evaluation or {}).get("representations", [])}
        layers = [by_layer[number] for number in sorted(number for number in by_layer if number)]
        if layers:
            _draw_layers(axes, layers, f"iteration {iteration.number}", _COLOURS[index % len(_COLOURS)])
        if 0 in by_layer:
            references[by_layer[0]["clusters"], by_layer[0]["pnmi"]] = None
    # Iterations that are evaluated with the same clusters have the same MFCC units: one line for both.
    for (clusters, pnmi), style in zip(references, ("--", "-.", (0, (1, 2))), strict=False):
        axes.axhline(pnmi, color=_GREY, linewidth=1.3, linestyle=style, label=f"MFCC, {clusters} clusters")
    axes.set_ylim(bottom=0)
    return bool(axes.lines)


def draw_speed(axes: Axes, found: Sequence[IterationSummary]) -> bool:
    axes.set(title="Training speed", xlabel="optimizer step", ylabel="speed (x real time)")
    drawn = _draw_training(axes, found, "x_realtime", None, scale=1.0)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    return drawn


_PLOTS: dict[str, Callable[[Axes, Sequence[IterationSummary]], bool]] = {
    "loss": draw_loss,
    "masked_accuracy": draw_masked_accuracy,
    "pnmi": draw_pnmi,
    "speed": draw_speed,
}


def _draw_training(
    axes: Axes, found: Sequence[IterationSummary], key: str, valid_key: str | None, *, scale: float
) -> bool:
    """A line per iteration from its training lines and, with ``valid_key``, circles from its validation lines."""
    drawn = False
    for index, iteration in enumerate(found):
        colour = _COLOURS[index % len(_COLOURS)]
        steps, values = _series(iteration.metrics.training, key, scale)
        if steps.size:
            drawn = True
            _draw_line(axes, steps, values, colour, f"iteration {iteration.number}, training")
        steps, values = _series(iteration.metrics.validation, valid_key, scale)
        if steps.size:
            drawn = True
            label = f"iteration {iteration.number}, held-out"
            axes.plot(
                steps, values, color=colour, linestyle="--", linewidth=1.0, marker="o", markersize=4.5, label=label
            )
    if drawn:
        axes.set_xlim(left=0)
    return drawn


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Long series are drawn pale, with a running mean over them."""
    if steps.size <= _SMOOTH_ABOVE:
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if steps.size == 1 else None, label=label)
        return
    width = max(3, steps.size // 60)
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width // 2 : width // 2 + smooth.size], smooth, color=colour, linewidth=1.8, label=label)


def _draw_layers(axes: Axes, layers: Sequence[dict[str, Any]], name: str, colour: str) -> None:
    numbers = [each["layer"] for each in layers]
    label = f"{name}, {layers[0]['clusters']} clusters"
    axes.plot(numbers, [each["pnmi"] for each in layers], color=colour, marker="o", linewidth=1.8, label=label)
    chance = [each["chance_pnmi"] for each in layers]
    axes.plot(numbers, chance, color=colour, linewidth=1.2, linestyle=":", label=f"{name}, by chance")


def _series(lines: Sequence[dict[str, Any]], key: str | None, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of ``key``."""
    points = [(line["step"], line[key] * scale) for line in lines if line.get(key) is not None]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def _style(axes: Axes) -> None:
    axes.grid(True, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelsize=10)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    axes.title.set_fontsize(12)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
