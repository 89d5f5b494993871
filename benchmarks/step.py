"""One pre-training step of HuBERT Base beside torchaudio's: time, sides in turn in one process, and peak memory.

    python -m benchmarks.step                       # 4 x 10 s, 100 and 500 classes, float32 and bfloat16 autocast
    python -m benchmarks.step --json result.json

Both sides start from the same weights, and before anything is timed they must give the same loss from the same masks with
dropout off. A step is objective, forward and backward, with dropout at its defaults. LayerDrop is off: it would leave
different layers out on the two sides, which is different work.
The ratio of medians is what to read: times on a shared machine move, and both sides move together.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import describe
from benchmarks.memory import peak_of
from benchmarks.peers import SIDES, Loss, build

_NO_DROPOUT = dict(
    encoder_projection_dropout=0.0, encoder_attention_dropout=0.0, encoder_dropout=0.0, encoder_layer_drop=0.0
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        print(json.dumps(_memory(arguments.memory_of, arguments)))
        return
    results = []
    print(
        f"{'classes':>7} {'dtype':>9} {'side':>12} {'median s':>9} {'p20':>7} {'p80':>7} {'x real time':>12} {'MiB':>7}"
    )
    for classes in arguments.classes:
        _check_same_loss(classes)
        for dtype in arguments.dtypes:
            case = _case(classes, dtype, arguments)
            results.append(case)
            print(
                f"{'':>7} {'':>9} torchaudio over hubert_fast: {case['speed_ratio']:.2f} in time; "
                f"hubert_fast over torchaudio: {case['memory_ratio']:.2f} in memory of the step"
            )
    if arguments.json:
        report = {"machine": describe(), "batch": arguments.batch, "seconds": arguments.seconds, "cases": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--dtypes", choices=sorted(_DTYPES), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _case(classes: int, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    sides = {side: build(side, classes, encoder_layer_drop=0.0) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    batch = _batch(classes, arguments)
    for repeat in range(arguments.repeats + 1):
        for side, (model, loss) in sides.items():
            torch.manual_seed(repeat)  # the same masks on both sides
            seconds = _step(model, loss, batch, _DTYPES[dtype])
            if repeat > 0:  # the first step warms up
                times[side].append(seconds)
    del sides
    gc.collect()
    case: dict[str, Any] = {"classes": classes, "dtype": dtype}
    for side in SIDES:
        quantiles = statistics.quantiles(times[side], n=10, method="inclusive")
        median, peak = statistics.median(times[side]), _memory_in_own_process(side, classes, dtype, arguments)
        case[side] = {
            "median_seconds": median,
            "p20_seconds": quantiles[1],
            "p80_seconds": quantiles[7],
            "x_real_time": arguments.batch * arguments.seconds / median,
            **peak,
        }
        print(
            f"{classes:>7} {dtype:>9} {side:>12} {median:>9.2f} {quantiles[1]:>7.2f} {quantiles[7]:>7.2f} "
            f"{case[side]['x_real_time']:>12.2f} {peak['step_bytes'] / 2**20:>7.0f}"
        )
    case["speed_ratio"] = case["torchaudio"]["median_seconds"] / case["hubert_fast"]["median_seconds"]
    case["memory_ratio"] = case["hubert_fast"]["step_bytes"] / case["torchaudio"]["step_bytes"]
    return case


def _batch(classes: int, arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    samples = int(16_000 * arguments.seconds)
    waveforms = torch.randn(arguments.batch, samples, generator=generator)
    frames = (samples - 400) // 320 + 1
    return waveforms, torch.randint(classes, (arguments.batch, frames), generator=generator)


def _step(model: nn.Module, loss: Loss, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = loss(*batch)
    value.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def _check_same_loss(classes: int) -> None:
    """A benchmark that compares different work is worse than none."""
    arguments = argparse.Namespace(batch=2, seconds=3.0)
    values = []
    for side in SIDES:
        model, loss = build(side, classes, **_NO_DROPOUT)
        torch.manual_seed(0)
        with torch.no_grad():
            values.append(float(loss(*_batch(classes, arguments))))
    if abs(values[0] - values[1]) > 1e-4 * abs(values[1]):
        raise SystemExit(f"the sides compute different losses ({dict(zip(SIDES, values))}): not timed")


def _memory_in_own_process(side: str, classes: int, dtype: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Each side's peak in a fresh process, where nothing of the other side can hide it."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory-of", side, "--classes", str(classes)]
    command += ["--dtypes", dtype, "--batch", str(arguments.batch), "--seconds", str(arguments.seconds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _memory(side: str, arguments: argparse.Namespace) -> dict[str, int]:
    classes, dtype = arguments.classes[0], _DTYPES[arguments.dtypes[0]]
    model, loss = build(side, classes, encoder_layer_drop=0.0)
    batch = _batch(classes, arguments)
    return peak_of(lambda: _step(model, loss, batch, dtype))


if __name__ == "__main__":
    main()
