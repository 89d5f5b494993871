"""``conv_frontend`` of HuBERT Base beside torchaudio's: forward, backward, layer 0 alone, and what is held for the backward.

    python -m benchmarks.ops.bench_conv_frontend                    # 4 x 10 s, float32 and bfloat16 autocast
    python -m benchmarks.ops.bench_conv_frontend --backends cpu torch --json result.json

Sides take turns in one process, from the same weights, after their features have been compared. Beside the times stands the
floor: the FLOPs of layers 1-6 (forward once, backward twice) over the rate of a large matrix product, measured in turn with them.
"layer 0" is that layer by itself, into a tensor of its own. In the whole front end backend "cpu" never makes such a tensor;
"within" is what its layer 0 takes there, into the windows of layer 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.peers import build
from hubert_fast import backend, extension
from hubert_fast.cpu_backend import conv_frontend as cpu_backend
from hubert_fast.ops.conv_frontend import conv_frontend

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The largest difference of features, relative to their norm, with which two sides still do the same work.
_SAME = {"float32": 1e-5, "bfloat16": 3e-2}


def main() -> None:
    arguments = _arguments()
    waveforms = torch.randn(
        arguments.batch, int(16_000 * arguments.seconds), generator=torch.Generator().manual_seed(1)
    )
    sides = _sides(arguments.backends)
    cases = []
    for dtype in arguments.dtypes:
        _check_same_features(sides, waveforms[:1, :48_000], dtype)
        cases.append(_case(sides, waveforms, dtype, arguments.repeats))
        _print(cases[-1])
    if arguments.json:
        report = {"machine": describe(), "batch": arguments.batch, "seconds": arguments.seconds, "cases": cases}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["auto"], help="of conv_frontend: auto, cpu, torch, ...")
    parser.add_argument("--dtypes", choices=sorted(_DTYPES), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Side:
    """A feature extractor, and its layer 0 alone."""

    def __init__(self, extractor: nn.Module, chosen: str = "") -> None:
        self.extractor, self.chosen = extractor, chosen

    def features(self, waveforms: Tensor) -> Tensor:
        with self._backend():
            return self.extractor(waveforms, None)[0]

    def first_layer(self, waveforms: Tensor) -> Tensor:
        block = self.extractor.conv_layers[0]
        if not self.chosen:
            return block(waveforms.unsqueeze(1), None)[0]
        norm = block.layer_norm
        with self._backend():
            return conv_frontend(
                waveforms,
                [block.conv.weight],
                [],
                [norm.weight],
                [norm.bias],
                strides=[block.stride],
                norm="group_norm",
            )

    def first_layer_within(self, waveforms: Tensor, dtype: torch.dtype) -> float:
        """Seconds of backend "cpu" for layer 0 as its forward runs it, chunk by chunk into one operand; statistics included."""
        block = self.extractor.conv_layers[0]
        above = self.extractor.conv_layers[1]
        weights, strides = [block.conv.weight, above.conv.weight], [block.stride, above.stride]
        norm = block.layer_norm
        start = time.perf_counter()
        frontend = cpu_backend._Frontend(
            waveforms, weights, [], [norm.weight], [norm.bias], strides, "group_norm", None, dtype
        )
        operand = frontend.empty(cpu_backend._FORWARD_ROWS, above.conv.weight[0].numel())
        for row in range(len(waveforms)):
            for first, last in cpu_backend._chunks(frontend.frames[1], cpu_backend._FORWARD_ROWS):
                frontend.c.forward(
                    **frontend.pass_over(0, row),
                    start=first * above.stride,
                    stop=(last - 1) * above.stride + above.kernel_size,
                    windows=frontend.windows(1, operand[: last - first]),
                )
        return time.perf_counter() - start

    def _backend(self):
        return backend.using(self.chosen or "auto", "conv_frontend")


def _sides(backends: list[str]) -> dict[str, Side]:
    theirs = build("torchaudio", 100)[0].wav2vec2.feature_extractor
    ours = build("hubert_fast", 100)[0].wav2vec2.feature_extractor
    return {"torchaudio": Side(theirs), **{name: Side(ours, name) for name in backends}}


def _check_same_features(sides: dict[str, Side], waveforms: Tensor, dtype: str) -> None:
    """A benchmark that compares different work is worse than none."""
    with torch.no_grad(), _autocast(dtype):
        theirs = sides["torchaudio"].features(waveforms).float()
        for name, side in sides.items():
            difference = float((side.features(waveforms).float() - theirs).norm() / theirs.norm())
            if difference > _SAME[dtype]:
                raise SystemExit(f"{name} and torchaudio compute different features ({difference:.1e}): not timed")


def _case(sides: dict[str, Side], waveforms: Tensor, dtype: str, repeats: int) -> dict[str, Any]:
    stages = ("forward", "backward", "both", "first_layer_forward")
    within: list[float] = []
    times: dict[str, dict[str, list[float]]] = {name: {stage: [] for stage in stages} for name in sides}
    rates = []
    for repeat in range(repeats + 1):
        rate = _matmul_rate(_DTYPES[dtype])
        for name, side in sides.items():
            seconds = _once(side, waveforms, dtype)
            if repeat > 0:  # the first turn warms up
                for stage in stages:
                    times[name][stage].append(seconds[stage])
        if repeat > 0:
            rates.append(rate)
            if extension.cpu() is not None:
                with torch.no_grad():
                    ours = next(side for side in sides.values() if side.chosen)
                    within.append(ours.first_layer_within(waveforms, _DTYPES[dtype]))
    rate = statistics.median(rates)
    case: dict[str, Any] = {
        "dtype": dtype,
        "matmul_gflops_per_second": rate / 1e9,
        "floor_seconds": 3 * _gemm_flops(waveforms) / rate,
        "first_layer_within_seconds": statistics.median(within) if within else None,
    }
    for name, side in sides.items():
        case[name] = {stage: _spread(values) for stage, values in times[name].items()}
        case[name]["bytes_held_for_backward"] = _held(lambda side=side: _forward(side, waveforms, dtype))
    theirs = case["torchaudio"]
    for name in sides:
        if name != "torchaudio":
            case[name]["ratios"] = {s: theirs[s]["median"] / case[name][s]["median"] for s in stages}
            held = case[name]["bytes_held_for_backward"] / theirs["bytes_held_for_backward"]
            case[name]["ratios"]["bytes_held_for_backward"] = held
    return case


def _autocast(dtype: str):
    return torch.autocast("cpu", _DTYPES[dtype], enabled=dtype != "float32")


def _forward(side: Side, waveforms: Tensor, dtype: str) -> Tensor:
    with _autocast(dtype):
        return side.features(waveforms)


def _once(side: Side, waveforms: Tensor, dtype: str) -> dict[str, float]:
    start = time.perf_counter()
    features = _forward(side, waveforms, dtype)
    forward = time.perf_counter() - start
    gradient = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features.dtype)
    start = time.perf_counter()
    features.backward(gradient)
    backward = time.perf_counter() - start
    side.extractor.zero_grad(set_to_none=True)
    del features
    start = time.perf_counter()
    with torch.no_grad(), _autocast(dtype):
        side.first_layer(waveforms)
    first_layer = time.perf_counter() - start
    return {
        "forward": forward,
        "backward": backward,
        "both": forward + backward,
        "first_layer_forward": first_layer,
    }


def _held(forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward, each storage once, parameters and audio included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def _gemm_flops(waveforms: Tensor) -> int:
    """Of layers 1-6 once, two a multiplication and addition."""
    batch, frames = waveforms.shape
    flops = 0
    for layer, (kernel, stride) in enumerate([(10, 5)] + [(3, 2)] * 4 + [(2, 2)] * 2):
        frames = (frames - kernel) // stride + 1
        flops += 2 * batch * frames * kernel * 512 * 512 if layer > 0 else 0
    return flops


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of layer 1's shape, best of three."""
    rows, inner, columns = 8192, 1536, 512
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds)


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}


def _print(case: dict[str, Any]) -> None:
    print(
        f"\n{case['dtype']}: products run at {case['matmul_gflops_per_second']:.0f} GFLOP/s; "
        f"floor of forward and backward {case['floor_seconds']:.2f} s"
    )
    if case["first_layer_within_seconds"] is not None:
        ratio = case["torchaudio"]["first_layer_forward"]["median"] / case["first_layer_within_seconds"]
        print(
            f"layer 0 within backend cpu: {case['first_layer_within_seconds']:.3f} s, torchaudio's takes {ratio:.1f} times that"
        )
    print(f"{'seconds (median)':>18} {'forward':>9} {'backward':>9} {'both':>9} {'layer 0':>9} {'MiB held':>9}")
    for name, side in case.items():
        if not isinstance(side, dict):
            continue
        cells = [f"{side[s]['median']:>9.3f}" for s in ("forward", "backward", "both", "first_layer_forward")]
        print(f"{name:>18} {' '.join(cells)} {side['bytes_held_for_backward'] / 2**20:>9.0f}")
        if "ratios" in side:
            r = side["ratios"]
            cells = [f"{r[s]:>8.2f}x" for s in ("forward", "backward", "both", "first_layer_forward")]
            print(f"{'':>18} {' '.join(cells)} {r['bytes_held_for_backward']:>9.2f}")


if __name__ == "__main__":
    main()
