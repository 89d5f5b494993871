"""What the suite measures whole: training steps, inference, and how the cost of a step grows. In order of importance.

Sizes follow the machine. A GPU gets what the published recipes give one (175 s of audio a step); a CPU gets what its time allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch

from .architecture import ARCHITECTURES, Architecture
from .batches import SAMPLE_RATE, even, librispeech_like
from .report import dtype_name
from .sizes import SIZES

# Peers that show how cost grows: enough to compare, and each point costs time.
_GROWTH_PEERS = ("hubert_fast", "torchaudio")
_INFERENCE_PEERS = ("hubert_fast", "torchaudio", "transformers sdpa", "transformers flash")
_COMPILED = ("torchaudio compiled", "minimal-hubert")
_LARGE_PEERS = ("hubert_fast", "hubert_fast graph", "torchaudio", "torchaudio masked only", "transformers sdpa")


@dataclass(frozen=True)
class Case:
    """One comparison. ``lengths`` are those (samples) of the utterances of each batch; a call works through all batches.

    "operators" is a place in the order of cases: the operators one by one, at the sizes of ``architecture``'s training.
    """

    kind: str  # "step", "inference", "scaling" or "operators"
    architecture: Architecture
    num_classes: int
    dtype: torch.dtype
    lengths: tuple[tuple[int, ...], ...]
    layout: str  # "even" or "librispeech-like"
    peers: tuple[str, ...] | None = None  # None: all
    without: tuple[str, ...] = ()
    axis: str | None = None  # of "scaling": "batch seconds", "utterance seconds" or "classes"
    value: float | None = None
    share: float = field(default=0.1, compare=False)  # of the whole time that it may take

    @property
    def name(self) -> str:
        """The same for all dtypes and implementations."""
        if self.kind == "operators":
            return self.kind
        model = self.architecture.name
        what = f"{model}, inference" if self.kind == "inference" else f"{model}, {self.num_classes} classes"
        if self.axis is not None:
            what = f"{self.axis} {self.value:g}: {what}"
        if self.layout == "even":
            lengths = self.lengths[0]
            return f"{what}, {len(lengths)} x {lengths[0] / SAMPLE_RATE:g} s"
        return f"{what}, LibriSpeech-like lengths, {self.grid_seconds:.0f} s with padding"

    @property
    def title(self) -> str:
        """The case as entries of what was left out name it."""
        return f"{self.name}, {dtype_name(self.dtype)}"

    @property
    def audio_seconds(self) -> float:
        """Of one step, without padding; of batches that differ, the mean."""
        return sum(map(sum, self.lengths)) / len(self.lengths) / SAMPLE_RATE

    @property
    def grid_seconds(self) -> float:
        """Of one step, with padding; of batches that differ, the mean."""
        return sum(len(each) * max(each) for each in self.lengths) / len(self.lengths) / SAMPLE_RATE


@dataclass(frozen=True)
class Scale:
    """How much work a step of the cases has."""

    utterances: int
    utterance_seconds: float
    librispeech_seconds: float  # of a batch with LibriSpeech-like lengths, with padding
    batches: int  # different ones, in turn
    axes: dict[str, tuple[float, ...]]


GPU = Scale(
    14, 12.5, 175.0, 4,
    {
        "batch seconds": (10, 25, 50, 100, 175, 350, 700),
        "utterance seconds": (2, 5, 10, 20, 40, 60, 120),
        "classes": (100, 500, 2000, 10_000),
    },
)  # fmt: skip


def cpu_scale(minutes: float, flops_per_second: float) -> Scale:
    """What fits: a step of the main case, by all implementations together, is to take about a fortieth of the time.

    A step is 46 GFLOP a second of audio (design.md); implementations run at about half the rate of products, and ten take turns.
    """
    audio = 60 * minutes / 40 * flops_per_second / (46e9 * 2 * 10)
    utterances, seconds = (2, 2.0) if audio < 6 else (2, 4.0) if audio < 14 else (2, 10.0) if audio < 30 else (4, 10.0)
    axes = {
        "batch seconds": tuple(each for each in (2, 4, 10, 25, 50, 100, 175) if each >= utterances * seconds / 2),
        "utterance seconds": (1, 2, 5, 10, 20, 40, 60, 120),
        "classes": (100, 500, 2000, 10_000),
    }
    return Scale(utterances, seconds, 32.0, 1, axes)


def plan(
    device: torch.device, scale: Scale, models: Sequence[str], dtypes: Sequence[torch.dtype], kinds: Collection[str]
) -> list[Case]:
    """What to measure, the most important first.

    Args:
        scale: `GPU`, or what `cpu_scale` says.
        models: names of architectures; all cases are made for the first, and a training step for the others.
        dtypes: all cases are made in the first, and a training step in the others.
        kinds: of "step", "inference", "scaling", "operators": others are left out, and their time goes to the rest.
    """
    first, *others = (ARCHITECTURES[name] for name in models)
    main, *more = dtypes
    on_gpu = device.type == "cuda"
    # On a GPU compiling takes longer than measuring everything else, so it comes later, in a case of its own.
    apart = {"share": 0.2, "without": _COMPILED} if on_gpu else {"share": 0.9}
    step = _even("step", first, 500, main, scale, **apart)
    compiled = _even("step", first, 500, main, scale, share=0.6, peers=_COMPILED)
    uneven = _librispeech_like(first, main, scale)
    inference = _even("inference", first, 500, main, scale, share=0.05, peers=_INFERENCE_PEERS)
    # Compiling anew for every dtype, model and number of classes takes long and shows nothing new.
    few_classes = _even("step", first, 100, main, scale, share=0.15, without=_COMPILED)
    in_other_dtypes = [_even("step", first, 500, dtype, scale, share=0.3, without=_COMPILED) for dtype in more]
    larger = [_even("step", other, 500, main, scale, share=0.12, peers=_LARGE_PEERS) for other in others]
    growth = _growth(first, main, scale)
    operators = [_even("operators", first, 500, main, scale, share=0.15)] if first.name in SIZES else []
    if on_gpu:
        order = [step, uneven, *operators, inference, *larger[:1], compiled, *growth]
        order += [*larger[1:], few_classes, *in_other_dtypes]
    else:
        order = [step, *in_other_dtypes, inference, uneven, *operators, *growth, few_classes, *larger]
    chosen = [each for each in order if each.kind in kinds]
    # Shares are of the time for what was asked for: a few cases by themselves are not to leave most of it unused.
    total = sum(each.share for each in chosen)
    return chosen if total >= 1.0 else [replace(each, share=each.share / total) for each in chosen]


def _even(
    kind: str, architecture: Architecture, classes: int, dtype: torch.dtype, scale: Scale, **settings: Any
) -> Case:
    lengths = tuple(even(scale.utterances, scale.utterance_seconds))
    return Case(kind, architecture, classes, dtype, (lengths,) * scale.batches, "even", **settings)


def _librispeech_like(architecture: Architecture, dtype: torch.dtype, scale: Scale) -> Case:
    lengths = librispeech_like(scale.librispeech_seconds, batches=scale.batches)
    return Case(
        "step", architecture, 500, dtype, tuple(map(tuple, lengths)), "librispeech-like", share=0.25, without=_COMPILED
    )


def _growth(architecture: Architecture, dtype: torch.dtype, scale: Scale) -> Iterator[Case]:
    """One axis at a time, the others as in the main case."""
    total = scale.utterances * scale.utterance_seconds

    def case(axis: str, value: float, classes: int, utterances: int, seconds: float) -> Case:
        lengths = (tuple(even(utterances, seconds)),) * min(2, scale.batches)
        settings = {"axis": axis, "value": value, "peers": _GROWTH_PEERS, "share": 0.05}
        return Case("scaling", architecture, classes, dtype, lengths, "even", **settings)

    # Each axis' small values before any axis' large ones: time may run out.
    for values in zip_longest(*scale.axes.values()):
        for axis, value in zip(scale.axes, values):
            if value is None:
                continue
            if axis == "batch seconds":
                utterances = max(1, round(value / scale.utterance_seconds))
                yield case(axis, value, 500, utterances, value / utterances)
            elif axis == "utterance seconds":
                yield case(axis, value, 500, max(1, round(total / value)), value)
            else:
                yield case(axis, value, int(value), scale.utterances, scale.utterance_seconds)
