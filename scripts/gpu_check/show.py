"""What a check found, as lines that fit a terminal: facts by part, and measured beside predicted.

python -m scripts.gpu_check.show OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from benchmarks import predictions
from scripts.gpu_check.facts import Facts

_WIDTH = 300  # characters of a line
_LINES = 24  # of a part


def lines_of(facts: Sequence[dict[str, Any]], parts: Iterable[str]) -> Iterator[str]:
    """The last of ``facts`` of ``parts``, one a line; of what is as it should be numbers alone."""
    for part in parts:
        for each in [each for each in facts if each["part"] == part][-_LINES:]:
            well = each.get("ok") is True
            shown = {
                name: _short(value)
                for name, value in each.items()
                if name not in ("part", "s", "done")
                and value is not None
                and not (well and isinstance(value, (dict, list)))
            }
            yield f"  {part}: {json.dumps(shown, default=str)}"[:_WIDTH]


def render(facts: Facts) -> list[str]:
    """Measured beside predicted; empty where no whole step of ours was measured."""
    tables = [table for part in ("step", "step peers") for table in _steps(facts.of(part))]
    if not tables:
        return []
    gpu = next(iter(facts.of("gpu")), {"name": "no GPU: tiny sizes on a CPU, which no prediction is about"})
    limits = next(iter(facts.of("limits")), {})
    left_out = [f"LEFT OUT: {each['operators']}: {each['why']}" for each in facts.of("left out")[-1:]]
    lines = [
        *left_out,
        f"{gpu['name']}: products {_number(limits.get('tflops_bf16'))} TFLOP/s, "
        f"copies {_number(limits.get('copy_tb_per_s'))} TB/s; "
        f"predicted for an H100 at {predictions.TFLOPS:.0f} TFLOP/s, {predictions.COPY_TB_PER_S} TB/s",
        *tables,
    ]
    low, high = predictions.HOST_MS
    lines.append(
        f"predicted: GPU {predictions.STEP_MS[0]} ms ({predictions.STEP_RANGE_MS[0]} to {predictions.STEP_RANGE_MS[1]}), "
        f"eager {low:.0f} to {high:.0f} ms of host time, graph under {predictions.GRAPH_HOST_MS:.0f}; "
        f"the aim is {predictions.AIM_MS} ms; "
        f"LayerDrop's graphs add {predictions.UPDATES['time, LayerDrop'].gaps_ms:.2f} ms of gaps"
    )
    return lines + _updates(facts) + _parts(facts)


def _steps(found: list[dict[str, Any]]) -> list[str]:
    """The implementations that were measured in turn in one process."""
    steps = {each["peer"]: each for each in found if "ms" in each}
    if "hubert_fast" not in steps:
        return []
    lines = [f"{'step':28} {'ms':>8} {'host ms':>8} {'audio s/s':>10} {'x ours':>7}"]
    for name, each in steps.items():
        rate, ratio = each["audio_s"] / each["ms"] * 1e3, each["ms"] / steps["hubert_fast"]["ms"]
        lines.append(f"{name:28} {each['ms']:8.2f} {each['host_ms']:8.2f} {rate:10,.0f} {ratio:7.2f}")
    return lines


def _updates(facts: Facts) -> list[str]:
    """Updates in graphs beside eager ones, and beside what the host was predicted to need."""
    timed = [each for each in facts.of("graphs") if "eager_ms" in each]
    if not timed:
        return []
    lines = [
        f"{'update: clipping, optimizer too':34} {'ms':>8} {'audio s/s':>10} {'host ms':>8} {'predicted':>9} "
        f"{'launches':>9} {'predicted':>9} {'graphs':>7} {'made in s':>9}"
    ]
    for each in timed:
        predicted = predictions.UPDATES[each["item"]]
        for side, prefix, host_ms in (("graphs", "", predicted.host_ms), ("eager", "eager_", predictions.HOST_MS[0])):
            ms, measured = each[f"{prefix}ms"], each[f"{prefix}host_ms"]
            line = f"{each['item'].replace('time', side):34} {ms:8.2f} {each['audio_s'] / ms * 1e3:10,.0f} "
            line += f"{measured:8.2f} {host_ms:9.2f}"
            if side == "graphs":
                graphs, seconds = (each[name] + each[f"optimizer_{name}"] for name in ("graphs", "capture_s"))
                line += f" {each['launches']:9.1f} {predicted.launches:9d} {graphs:7d} {seconds:9.2f}"
            lines.append(line)
    taken = {side: timed[0].get(name) for side, name in (("eager", "eager_memory_gib"), ("graphs", "memory_gib"))}
    if all(taken.values()):
        sides = [f"{side} {_gib(each)}" for side, each in taken.items()]
        lines.append(f"GiB: predicted {timed[0]['predicted_gib']:.2f}; {'; '.join(sides)}")
    return lines


def _gib(taken: dict[str, float]) -> str:
    return ", ".join(f"{value:.2f} {name}" for name, value in taken.items())


def _parts(facts: Facts) -> list[str]:
    measured = {each["name"]: each for each in facts.of("part")}
    if not measured:
        return []
    lines = [
        f"{'part of the step':34} {'launches':>9} {'predicted':>9} {'floor ms':>9} {'before':>9} {'predicted':>9} {'measured':>9}"
    ]
    for part in predictions.PARTS:
        found = measured.get(part.name, {"launches": 0, "ms": 0.0})
        lines.append(
            f"{part.name:34} {found['launches']:9.0f} {part.launches:9d} "
            f"{part.floor_ms:9.2f} {part.predicted_ms:9.2f} {part.improved_ms:9.2f} {found['ms']:9.2f}"
        )
    return lines


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, list) else value


def _number(value: Optional[float]) -> str:
    return "?" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    found = Facts(Path(sys.argv[1]))
    print("\n".join(render(found)))
