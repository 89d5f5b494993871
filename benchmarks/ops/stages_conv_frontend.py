"""Each stage of the GPU's ``conv_frontend`` against its floor: bytes over measured bandwidth, or FLOPs over the measured rate.

    python -m benchmarks.ops.stages_conv_frontend                                        # 11 x 15.9 s in bfloat16
    python -m benchmarks.ops.stages_conv_frontend --norm layer_norm

Bandwidth is that of a large copy, bytes read and written; the rate is that of an 8192 x 8192 x 8192 product in the same dtype on
random data. A stage's floor is the larger of its two. Stages are timed by events around each call of the extension inside
whole steps, the median over ``--repeats`` of them, with the queue kept full so that launches are not what is timed; products
of torch.mm (float32) show as what is left of the whole. It prints; the operator's results are `bench_conv_frontend`'s.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubert_fast import extension
from hubert_fast.cuda_backend import conv_frontend as backend
from hubert_fast.ops.conv_frontend import Arguments

from ..clock import Instant
from ..limits import measure_limits
from ..report import Limits
from .bench_conv_frontend import SHAPES, Stack
from .turns import in_turn

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WARM_UP = 2  # steps
_QUEUED_CYCLES = 200_000_000  # a tenth of a second, in which the host gets ahead


def main() -> None:
    arguments = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU, and torch finds none")
    if extension.cuda() is None:
        raise SystemExit(f"this benchmark needs the CUDA kernels: {extension.why_not('cuda')}")
    case, dtype = _Case(arguments), _DTYPES[arguments.dtype]
    limits = measure_limits("cuda", dtype)
    stages = _stages(case, dtype, arguments.repeats, limits)
    steps = {"forward": lambda i: case.forward(), "both": lambda i: case.both()}
    taken, errors = in_turn(steps, "cuda", repeats=arguments.repeats, seconds=float("inf"))
    for error in errors.values():
        raise error
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {arguments.batch} x {arguments.seconds} s, "
        f"{arguments.dtype}, {arguments.norm}"
    )
    _print(case, stages, limits, *(statistics.median(taken[name]) for name in steps))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=11, help="utterances")
    parser.add_argument("--seconds", type=float, default=15.9, help="of audio each")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16")
    parser.add_argument("--norm", choices=["group_norm", "layer_norm"], default="group_norm")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


class _Stage(NamedTuple):
    """Calls of the extension under one label."""

    label: str
    calls: int
    seconds: float
    floor_seconds: float


class _Case:
    """Parameters and audio of one case, and its steps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        samples = int(arguments.seconds * 16_000)
        stack = Stack(SHAPES, 512, arguments.norm, _DTYPES[arguments.dtype], "cuda", arguments.batch, samples)
        inputs = stack.draw(0)
        audio, *parameters = (each.detach() for each in inputs.tensors)
        self.arguments = Arguments(audio, *stack.split(parameters), stack.strides, stack.norm, None, stack.dtype)
        self.direction = inputs.directions[0].to(stack.dtype)
        self.flops = sum(each.flops for each in stack.work())

    @torch.no_grad()
    def forward(self, kernels: Any = None) -> tuple[tuple[Tensor], list[Tensor]]:
        return backend.forward(self.arguments, True, kernels=kernels)

    @torch.no_grad()
    def both(self, kernels: Any = None) -> None:
        _, saved = self.forward(kernels)
        backend.backward(self.arguments, saved, (self.direction,), [True] * 4, kernels=kernels)


class _Timed:
    """The extension with an event before and after each call, and with what each call has to move and to compute."""

    def __init__(self, kernels: Any, dtype: torch.dtype) -> None:
        self._kernels, self._size = kernels, dtype.itemsize
        self._sizes: dict[int, dict[str, int]] = {}
        self._kept: list[Any] = []
        self.calls: list[tuple[str, Instant, Instant, float, float]] = []

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._kernels, name)
        if name in ("FirstLayer", "Rows", "Product"):
            return lambda **sizes: self._remember(attribute(**sizes), sizes)
        cost = _COSTS.get(name)
        if cost is None:
            return attribute

        def timed(*positional: Any, **keywords: Any) -> None:
            sizes = {**keywords, **(self._sizes[id(positional[0])] if positional else {})}
            start = Instant()
            attribute(*positional, **keywords)
            self.calls.append((_label(name, sizes), start, Instant(), *cost(sizes, self._size)))

        return timed

    def _remember(self, made: Any, sizes: dict[str, int]) -> Any:
        self._kept.append(made)  # so that its id stays its own
        self._sizes[id(made)] = sizes
        return made


def _label(name: str, sizes: dict[str, int]) -> str:
    if "depth" in sizes:
        columns = sizes.get("columns", sizes.get("channels"))
        return f"{name} {sizes['rows']}x{columns}x{sizes['depth']}"
    if name.startswith("first_layer"):
        return name
    rows = sizes["batch"] * sizes["rows"] if "batch" in sizes else sizes.get("total_rows", sizes.get("columns"))
    return f"{name} {rows}"


def _values(sizes: dict[str, int], rows: str) -> int:
    return sizes["batch"] * sizes[rows] * sizes["channels"]


def _samples(sizes: dict[str, int]) -> int:
    return 4 * sizes["batch"] * sizes["frames"] * sizes["stride"]


def _product_cost(outputs: Callable[[dict[str, int]], int]) -> Callable[[dict[str, int], int], tuple[float, float]]:
    """(bytes, FLOPs) of a product that reads its input once and moves ``outputs`` tensors of its result's size."""

    def cost(sizes: dict[str, int], size: int) -> tuple[float, float]:
        rows, columns, depth = sizes["rows"], sizes["columns"], sizes["depth"]
        moved = rows * min(depth, sizes["input_stride"]) + columns * depth + outputs(sizes) * rows * columns
        return moved * size, 2.0 * rows * columns * depth

    return cost


def _weight_cost(sizes: dict[str, int], size: int) -> tuple[float, float]:
    rows, channels, depth = sizes["rows"], sizes["channels"], sizes["depth"]
    parts = -(-rows // sizes["part_rows"])
    moved = size * rows * (channels + min(depth, sizes["input_stride"])) + 4 * parts * channels * depth
    return moved, 2.0 * rows * channels * depth


def _backward_cost(sizes: dict[str, int], size: int) -> tuple[float, float]:
    tensors = 3 + (1 if sizes["activation"] else 0)
    return size * tensors * _values(sizes, "rows"), 0.0


# (bytes, FLOPs) a call has to move and to compute: each input read once, each output written once.
_COSTS: dict[str, Callable[[dict[str, int], int], tuple[float, float]]] = {
    "first_layer_moments": lambda s, size: (_samples(s), 0.0),
    "first_layer_group_norm": lambda s, size: (0.0, 0.0),
    "first_layer_layer_norm": lambda s, size: (0.0, 0.0),
    "first_layer_forward": lambda s, size: (
        _samples(s) + size * s["batch"] * s["frames"] * s["channels"],
        2.0 * s["batch"] * s["frames"] * s["channels"] * s["kernel"],
    ),
    "first_layer_group_norm_backward": lambda s, size: (_samples(s) + 2 * size * _values(s, "frames"), 0.0),
    "first_layer_layer_norm_backward": lambda s, size: (_samples(s) + 2 * size * _values(s, "frames"), 0.0),
    "first_layer_group_norm_finish": lambda s, size: (0.0, 0.0),
    "first_layer_layer_norm_finish": lambda s, size: (0.0, 0.0),
    "activation_forward": lambda s, size: (size * (_values(s, "frames") + _values(s, "out_rows")), 0.0),
    "gelu_backward": _backward_cost,
    "layer_norm_backward": _backward_cost,
    "clear_dead_rows": lambda s, size: (2 * size * s["batch"] * (s["rows"] - s["frames"]) * s["channels"], 0.0),
    "column_sums": lambda s, size: (size * s["total_rows"] * s["channels"], 0.0),
    "sum_parts": lambda s, size: (4 * s["outer"] * s["columns"] * (s["parts"] + 1), 0.0),
    "product": _product_cost(lambda s: 1),
    "product_gelu": _product_cost(lambda s: 2 if s["z"] else 1),
    "product_gelu_gradient": _product_cost(lambda s: 3 if s["activation"] else 2),
    "weight_gradient": _weight_cost,
}


def _stages(case: _Case, dtype: torch.dtype, repeats: int, limits: Limits) -> list[_Stage]:
    times: dict[str, list[float]] = defaultdict(list)
    for repeat in range(_WARM_UP + repeats):
        timed = _Timed(extension.cuda(), dtype)
        torch.cuda._sleep(_QUEUED_CYCLES)
        case.both(timed)
        torch.cuda.synchronize()
        calls: dict[str, int] = defaultdict(int)
        seconds: dict[str, float] = defaultdict(float)
        floors: dict[str, float] = defaultdict(float)
        for label, start, end, moved, flops in timed.calls:
            calls[label] += 1
            seconds[label] += end - start
            floors[label] += max(moved / limits.bytes_per_second, flops / limits.flops_per_second)
        for label in seconds if repeat >= _WARM_UP else ():
            times[label].append(seconds[label])
    return [_Stage(label, calls[label], statistics.median(each), floors[label]) for label, each in times.items()]


def _print(case: _Case, stages: list[_Stage], limits: Limits, forward: float, both: float) -> None:
    """``forward`` and ``both``: seconds of the forward, and with its backward."""
    print(f"copy {limits.bytes_per_second / 1e12:.2f} TB/s, product {limits.flops_per_second / 1e12:.0f} TFLOP/s")
    for stage in stages:
        seconds, floor = stage.seconds, stage.floor_seconds
        share = f"floor {1e6 * floor:9.1f} ({floor / seconds:4.0%})"
        print(f"{1e6 * seconds:9.1f} us, {share}  {stage.calls} x {stage.label}")
    print(f"{1e6 * (both - sum(stage.seconds for stage in stages)):9.1f} us in operations of torch")
    share = case.flops / both / limits.flops_per_second
    print(f"forward {1e3 * forward:.2f} ms, with backward {1e3 * both:.2f} ms: {share:.0%} of the rate of products")


if __name__ == "__main__":
    main()
