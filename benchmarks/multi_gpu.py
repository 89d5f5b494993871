"""What data-parallel training on several GPUs would reach, projected from a step measured on one. Nothing here is a measurement.

    python -m benchmarks.multi_gpu RESULT.json

The model is that of DistributedDataParallel: gradients are reduced in the order in which the backward makes them, those of a
layer together (its buckets are about as large), beside the rest of the backward. What is not done when the backward ends is
exposed. When each gradient is ready follows from the model's FLOPs. On top of that every step waits for the rank whose batch
takes longest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch

from hubert_fast import hubert_pretrain_model

from . import quantities
from .architecture import ARCHITECTURES, Architecture
from .batches import SAMPLE_RATE
from .flops import ATTENTION, FEED_FORWARD, FRONT_END, LOSS, POSITIONAL, PROJECTION, step_flops_by_stage
from .report import load
from .table import columns

_GPUS = (1, 2, 4, 8, 16, 32, 64)
_USUAL_LENGTH = 12.3  # seconds, the mean of LibriSpeech: decides only about attention's share of the backward
_GRADIENT_BYTES = 4  # float32, also under autocast


class Assumptions(NamedTuple):
    """What the projection rests on. Bandwidths are nominal ones, in one direction, of NVIDIA's data sheet of the DGX H100."""

    gpus_per_node: int = 8
    nvlink_bytes_per_second: float = 450e9  # of a GPU
    network_bytes_per_second: float = 400e9  # of a node: eight adapters of 400 Gbit/s, which a ring uses side by side
    reached_bandwidth: float = 0.75  # share of the nominal one that large all-reduces get
    hop_seconds: float = 5e-6  # latency; an all-reduce along a tree has 2 log2(GPUs) hops
    backward_share: float = 0.6  # of a step: twice the forward pass, and then the optimizer
    compute_lost: float = 0.1  # share of the compute that communication takes while it runs beside it
    length_spread: float = 0.03  # of step times between ranks, deviation over mean: batches are not equally full


class Projection(NamedTuple):
    """A step on several GPUs."""

    step_seconds: float
    efficiency: float  # of each GPU's throughput, against one alone
    all_reduce_seconds: float  # of all gradients
    exposed_seconds: float  # of those, after the backward
    waiting_seconds: float  # for the slowest rank


def project(
    step_seconds: float, model: Sequence[tuple[float, int]], gpus: int, assumptions: Assumptions = Assumptions()
) -> Projection:
    """A step on ``gpus`` GPUs, each with a batch that takes ``step_seconds`` on one alone, of a ``model`` with these `parts`."""
    backward = assumptions.backward_share * step_seconds
    whole = sum(flops for flops, _ in model)
    total, ready, end = 0.0, 0.0, 0.0
    for flops, size in model:
        seconds = all_reduce_seconds(size, gpus, assumptions)
        ready += flops / whole * backward
        end = max(end, ready) + seconds
        total += seconds
    exposed = max(0.0, end - backward) if gpus > 1 else 0.0
    slowdown = assumptions.compute_lost * (total - exposed)
    # The expected largest of as many normal numbers (Blom 1958).
    largest = NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))
    waiting = largest * assumptions.length_spread * step_seconds
    projected = step_seconds + exposed + slowdown + waiting
    return Projection(projected, step_seconds / projected, total, exposed, waiting)


def all_reduce_seconds(size: int, gpus: int, assumptions: Assumptions = Assumptions()) -> float:
    """Of ``size`` bytes: each GPU sends and receives 2 (n - 1) / n of them, whatever the algorithm (Patarasuk and Yuan 2009)."""
    nominal = assumptions.nvlink_bytes_per_second
    if gpus > assumptions.gpus_per_node:
        nominal = min(nominal, assumptions.network_bytes_per_second)
    bandwidth = assumptions.reached_bandwidth * nominal
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * assumptions.hop_seconds


def parts(architecture: Architecture, num_classes: int = 500) -> list[tuple[float, int]]:
    """(FLOPs of a step, bytes of gradients) in the order in which the backward makes them."""
    with torch.device("meta"):
        model = hubert_pretrain_model(**architecture.factory_arguments(num_classes))
    flops = step_flops_by_stage(architecture, [round(_USUAL_LENGTH * SAMPLE_RATE)], num_classes)
    of_layer = (flops[ATTENTION] + flops[FEED_FORWARD]) / architecture.layers
    encoder = model.wav2vec2.encoder
    found = [
        (flops[LOSS], model.logit_generator),
        *((of_layer, layer) for layer in encoder.transformer.layers),
        (flops[POSITIONAL], encoder.transformer.pos_conv_embed),
        (flops[PROJECTION], encoder.feature_projection),  # the mask embedding and a norm are in none: 3 dim numbers
        (flops[FRONT_END], model.wav2vec2.feature_extractor),
    ]
    return [(flops, _GRADIENT_BYTES * sum(each.numel() for each in part.parameters())) for flops, part in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each training step of ours on a GPU that the result file has."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a result file with training steps on a GPU")
    result = parser.parse_args(arguments).result
    try:
        rows = [row for row in load(result).rows if row.kind == "step" and row.device == "cuda"]
    except ValueError as error:
        parser.error(str(error))
    rows = [row for row in rows if row.implementation.startswith("hubert_fast")]
    if not rows:
        parser.error(f"{result} has no training step of hubert_fast on a GPU, and no other can be projected from")
    print("Projected, not measured, on these assumptions:")
    for name, value in Assumptions()._asdict().items():
        print(f"  {name.replace('_', ' ')}: {value:,.10g}")
    for row in rows:
        model = parts(ARCHITECTURES[row.shape["model"]], row.shape["classes"])
        print(
            f"\n{row.implementation}, {row.case}, {row.dtype}, from a step of {quantities.seconds(row.seconds.median)}; "
            f"{quantities.size(sum(size for _, size in model))} of gradients"
        )
        lines = [["GPUs", "step", "all-reduce", "exposed", "waiting", "efficiency", "audio s/s"]]
        for gpus in _GPUS:
            found = project(row.seconds.median, model, gpus)
            times = (found.step_seconds, found.all_reduce_seconds, found.exposed_seconds, found.waiting_seconds)
            speed = quantities.digits(gpus * row.audio_seconds / found.step_seconds)
            lines.append([str(gpus), *map(quantities.seconds, times), f"{found.efficiency:.1%}", speed])
        print(columns(lines, left=()))


if __name__ == "__main__":
    main()
