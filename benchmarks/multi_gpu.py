"""What data-parallel training on several GPUs would reach, projected from a step measured on one. Nothing here is a measurement.

    python -m benchmarks.multi_gpu RESULT.json                   # from the step rows of a GPU
    python -m benchmarks.multi_gpu --step-ms 22.4 --model base --audio 175

The model is that of DistributedDataParallel: gradients fill buckets in the order in which the backward makes them, and a bucket's
all-reduce runs beside the rest of the backward. What is not done when the backward ends is exposed. When each gradient is ready
follows from the model's FLOPs. On top of that every step waits for the rank whose batch takes longest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from . import quantities
from .architecture import ARCHITECTURES, Architecture
from .batches import SAMPLE_RATE
from .flops import ATTENTION, FEED_FORWARD, FRONT_END, LOSS, POSITIONAL, PROJECTION, step_flops_by_stage
from .report import Report, load
from .table import columns

_GPUS = (1, 2, 4, 8, 16, 32, 64)
_USUAL_LENGTH = 12.3  # seconds, the mean of LibriSpeech: decides only about attention's share of the backward
_GRADIENT_BYTES = 4  # float32, also under autocast

# Assumptions that may not be 0.
_POSITIVE = (
    "gpus_per_node",
    "nvlink_bytes_per_second",
    "network_bytes_per_second",
    "reached_bandwidth",
    "bucket_bytes",
)


@dataclass(frozen=True)
class Assumptions:
    """What the projection rests on. Bandwidths are nominal ones, in one direction, of NVIDIA's data sheet of the DGX H100."""

    gpus_per_node: int = 8
    nvlink_bytes_per_second: float = 450e9  # of a GPU
    network_bytes_per_second: float = 400e9  # of a node: eight adapters of 400 Gbit/s, which a ring uses side by side
    reached_bandwidth: float = 0.75  # share of the nominal one that large all-reduces get
    hop_seconds: float = 5e-6  # latency; an all-reduce along a tree has 2 log2(GPUs) hops
    bucket_bytes: int = 25 * 2**20  # DistributedDataParallel's default
    first_bucket_bytes: int = 2**20  # likewise
    backward_share: float = 0.6  # of a step: twice the forward pass, and then the optimizer
    compute_lost: float = 0.1  # share of the compute that communication takes while it runs beside it
    length_spread: float = (
        0.03  # of step times between ranks, standard deviation over mean: batches are not equally full
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, positive = getattr(self, each.name), each.name in _POSITIVE
            if not (value > 0 if positive else value >= 0):
                raise ValueError(f"{each.name} must be {'positive' if positive else 'at least 0'}; got {value}")


class Projection(NamedTuple):
    """A step on several GPUs."""

    gpus: int
    step_seconds: float
    efficiency: float  # of each GPU's throughput, against one alone
    all_reduce_seconds: float  # of all gradients
    exposed_seconds: float  # of those, after the backward
    waiting_seconds: float  # for the slowest rank


def project(
    step_seconds: float,
    architecture: Architecture,
    gpus: int,
    assumptions: Assumptions = Assumptions(),
    *,
    num_classes: int = 500,
) -> Projection:
    """A step on ``gpus`` GPUs, each with a batch that takes ``step_seconds`` on one GPU alone.

    Raises:
        ValueError: for less than 1 GPU, or a time that is not positive.
    """
    if gpus < 1 or not step_seconds > 0:
        raise ValueError(f"gpus must be at least 1 and step_seconds positive; got {gpus} and {step_seconds}")
    backward = assumptions.backward_share * step_seconds
    total, end = 0.0, 0.0
    for ready, size in _buckets(architecture, num_classes, assumptions):
        seconds = all_reduce_seconds(size, gpus, assumptions)
        end = max(end, ready * backward) + seconds
        total += seconds
    exposed = max(0.0, end - backward) if gpus > 1 else 0.0
    slowdown = assumptions.compute_lost * (total - exposed)
    # The expected largest of as many normal numbers (Blom 1958).
    largest = NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))
    waiting = largest * assumptions.length_spread * step_seconds
    projected = step_seconds + exposed + slowdown + waiting
    return Projection(gpus, projected, step_seconds / projected, total, exposed, waiting)


def all_reduce_seconds(size: int, gpus: int, assumptions: Assumptions = Assumptions()) -> float:
    """Of ``size`` bytes: each GPU sends and receives 2 (n - 1) / n of them, whatever the algorithm (Patarasuk and Yuan 2009)."""
    if gpus == 1:
        return 0.0
    nominal = assumptions.nvlink_bytes_per_second
    if gpus > assumptions.gpus_per_node:
        nominal = min(nominal, assumptions.network_bytes_per_second)
    bandwidth = assumptions.reached_bandwidth * nominal
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * assumptions.hop_seconds


def parameters(architecture: Architecture, num_classes: int) -> int:
    """How many numbers a `HuBERTPretrainModel` trains."""
    return sum(count for _, count in _parts(architecture, num_classes))


def _parts(architecture: Architecture, num_classes: int) -> Iterator[tuple[str, int]]:
    """(stage, parameters) in the order in which the backward makes their gradients; a layer is two of them."""
    dim, ffn, features = architecture.dim, architecture.ffn, architecture.convolutions[-1][0]
    norm = 2 * dim
    yield LOSS, (dim + 1) * architecture.final_dim + num_classes * architecture.final_dim
    for _ in range(architecture.layers):
        yield FEED_FORWARD, (dim + 1) * ffn + (ffn + 1) * dim + norm
        yield ATTENTION, 4 * (dim + 1) * dim + norm
    yield POSITIONAL, dim * (dim // architecture.groups) * architecture.taps + architecture.taps + dim + norm
    yield PROJECTION, 2 * features + (features + 1) * dim + dim  # and the mask embedding
    channels = [each[0] for each in architecture.convolutions]
    filters = sum(a * b * taps for a, (b, taps, _) in zip([1, *channels], architecture.convolutions))
    yield FRONT_END, filters + 2 * (channels[0] if architecture.norm == "group_norm" else sum(channels))


def _buckets(architecture: Architecture, num_classes: int, assumptions: Assumptions) -> Iterator[tuple[float, int]]:
    """(share of the backward after which it is ready, bytes) of each bucket of gradients."""
    flops = step_flops_by_stage(architecture, [round(_USUAL_LENGTH * SAMPLE_RATE)], num_classes)
    whole, limit = sum(flops.values()), assumptions.first_bucket_bytes
    done, held = 0.0, 0
    for stage, count in _parts(architecture, num_classes):
        repeated = stage in (ATTENTION, FEED_FORWARD)
        done += flops[stage] / whole / (architecture.layers if repeated else 1)
        held += _GRADIENT_BYTES * count
        if held >= limit:
            yield done, held
            held, limit = 0, assumptions.bucket_bytes
    if held:
        yield 1.0, held


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 where what was given cannot be projected from."""
    try:
        return _main(_parser().parse_args(arguments))
    except ValueError as error:
        print(f"python -m benchmarks.multi_gpu: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    if (options.result is None) == (options.step_ms is None):
        raise SystemExit("give either a result file or --step-ms")
    assumptions = replace(Assumptions(), **dict(options.assume))
    print("Projected, not measured, on these assumptions:")
    for each in fields(assumptions):
        print(f"  {each.name.replace('_', ' ')}: {getattr(assumptions, each.name):,.10g}")
    if options.step_ms is not None:
        title = f"if a step of {options.model} took {options.step_ms:g} ms, which is an assumption too"
        cases = [(title, options.step_ms / 1e3, ARCHITECTURES[options.model], options.classes, options.audio)]
    else:
        cases = list(_measured(load(options.result)))
        if not cases:
            print(
                f"\n{options.result} has no training step of hubert_fast on a GPU, and no other can be projected from."
            )
            return 1
    for title, seconds, architecture, classes, audio in cases:
        found = [project(seconds, architecture, gpus, assumptions, num_classes=classes) for gpus in options.gpus]
        print(f"\n{title}; {quantities.size(_GRADIENT_BYTES * parameters(architecture, classes))} of gradients")
        print(_table(found, audio))
    return 0


def _measured(report: Report) -> Iterator[tuple[str, float, Architecture, int, float | None]]:
    for row in report.rows:
        if row.kind == "step" and row.device == "cuda" and row.implementation.startswith("hubert_fast"):
            title = f"{row.implementation}, {row.case}, {row.dtype}, from a step of {quantities.seconds(row.seconds.median)}"
            architecture = ARCHITECTURES[row.shape["model"]]
            yield title, row.seconds.median, architecture, row.shape["classes"], row.audio_seconds


def _table(projections: Sequence[Projection], audio_seconds: float | None) -> str:
    lines = [["GPUs", "step", "all-reduce", "exposed", "waiting", "efficiency", "audio s/s"]]
    for each in projections:
        times = (each.step_seconds, each.all_reduce_seconds, each.exposed_seconds, each.waiting_seconds)
        speed = "-" if audio_seconds is None else quantities.digits(each.gpus * audio_seconds / each.step_seconds)
        lines.append([str(each.gpus), *map(quantities.seconds, times), f"{each.efficiency:.1%}", speed])
    return columns(lines, left=())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="a result file with training steps on a GPU")
    parser.add_argument("--step-ms", type=float, help="what if: milliseconds of a step on one GPU")
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="base", help="of --step-ms")
    parser.add_argument("--classes", type=int, default=500, help="of --step-ms")
    parser.add_argument("--audio", type=float, help="seconds of audio of a step of --step-ms")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(_GPUS))
    parser.add_argument(
        "--assume", type=_assumption, nargs="+", default=[], metavar="NAME=NUMBER", help="other assumptions, by name"
    )
    return parser


def _assumption(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    name = name.replace("-", "_")
    names = [each.name for each in fields(Assumptions)]
    if name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is no assumption; there are {', '.join(names)}")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} must be a number; got {number!r}") from None


if __name__ == "__main__":
    raise SystemExit(main())
