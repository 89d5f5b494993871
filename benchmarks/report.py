"""The one form of result file: what was measured, on what, beside which limits.

A file is JSON: ``{"schema": 1, "machine": {...}, "settings": {...}, "limits": {...}, "rows": [...], "left_out": [...]}``. Every
benchmark of this suite writes it, and tables, plots, `compare` and the README's tables are made from it alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hubert_fast.pretrain.atomic import write_text

SCHEMA = 1


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as result files have it: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Limits:
    """What the device does at best, measured in the same run."""

    bytes_per_second: float  # a large copy, bytes read and written
    flops_per_second: float  # a large matrix product of random numbers in the dtype


@dataclass(frozen=True)
class Seconds:
    """Of one call: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    count: int  # timed calls

    @staticmethod
    def of(samples: Sequence[float]) -> Seconds:
        fifths = statistics.quantiles(samples, n=5, method="inclusive") if len(samples) > 1 else [samples[0]] * 4
        return Seconds(statistics.median(samples), fifths[0], fifths[-1], len(samples))


@dataclass(frozen=True)
class Row:
    """One implementation in one case."""

    kind: str  # "step": a training step; "inference": extract_features; "operator"; "scaling": a training step along an axis
    case: str  # the same text for all that did the same work
    implementation: str
    version: str
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32", "bfloat16" (under autocast), ...
    shape: dict[str, Any]  # what the case is, in numbers: model, classes, utterances, audio_seconds, axis...
    seconds: Seconds
    peak_bytes: int | None = None  # weights, optimizer state and what a call takes beyond them at its peak
    step_bytes: int | None = (
        None  # of those, what a call takes; GPU, and operators: PyTorch's allocations; else resident memory
    )
    audio_seconds: float | None = None  # of one call, without padding
    flops: float | None = None  # the model's or operator's, by formula; padding and recomputation are not counted
    bytes: float | None = None  # the least that has to be moved
    limits: Limits | None = None
    first_seconds: float | None = None  # of the first call, with compiling
    stages: dict[str, float] | None = None  # seconds of one call by stage
    check: dict[str, float] | None = None  # how far loss, gradients or results were from the reference's before timing

    @property
    def throughput(self) -> float | None:
        """Seconds of audio per second."""
        return None if self.audio_seconds is None else self.audio_seconds / self.seconds.median

    @property
    def flops_per_second(self) -> float | None:
        return None if self.flops is None else self.flops / self.seconds.median

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.bytes is None else self.bytes / self.seconds.median

    @property
    def floor_seconds(self) -> float | None:
        """The least time at the measured limits: FLOPs over rate or bytes over bandwidth, the larger."""
        if self.limits is None or (self.flops is None and self.bytes is None):
            return None
        arithmetic = (self.flops or 0.0) / self.limits.flops_per_second
        return max(arithmetic, (self.bytes or 0.0) / self.limits.bytes_per_second)

    @property
    def share_of_limit(self) -> float | None:
        """The floor over the median: model FLOPs utilisation where no bytes are counted."""
        return None if self.floor_seconds is None else self.floor_seconds / self.seconds.median


NO_TIME = "no time"  # how the reason begins where more minutes would help
ELSEWHERE = "compiled anew for every dtype, model and layout, so in one case at most"


@dataclass(frozen=True)
class LeftOut:
    """What was not measured, and why."""

    case: str
    implementation: str
    reason: str
    rejected: bool = False  # it does other work than the reference: an error, unlike something that is not installed
    lost_device: bool = False  # it made the device unusable for its process; what came later was measured in another


@dataclass
class Report:
    """The contents of a result file."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: dict[str, Limits] = field(default_factory=dict)  # by dtype
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def settled(self, kind: str, case: str, dtype: str) -> set[str]:
        """Implementations of a case that were measured or left out; not those that a case of the same name may measure."""
        measured = {row.implementation for row in self.rows if (row.kind, row.case, row.dtype) == (kind, case, dtype)}
        of_case = [each for each in self.left_out if each.case == f"{case}, {dtype}" and each.reason != ELSEWHERE]
        return measured | {each.implementation for each in of_case}


_DERIVED = ("throughput", "flops_per_second", "bytes_per_second", "floor_seconds", "share_of_limit")


def save(report: Report, path: Path) -> None:
    """Write ``path`` whole or not at all. What follows from a row's other fields is written too, for other readers."""
    rows = [asdict(row) | {name: getattr(row, name) for name in _DERIVED} for row in report.rows]
    contents = {"schema": SCHEMA, **asdict(report), "rows": rows}
    write_text(path, json.dumps(contents, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Report:
    """Read what `save` wrote.

    Raises:
        ValueError: where ``path`` is no such file, naming what is wrong.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    schema = contents.get("schema", "not said") if isinstance(contents, dict) else "not said"
    if schema != SCHEMA:
        raise ValueError(f"{path} is no result file of schema {SCHEMA}: its schema is {schema}")
    try:
        return Report(
            contents["machine"],
            contents["settings"],
            {dtype: Limits(**each) for dtype, each in contents["limits"].items()},
            [_row(each) for each in contents["rows"]],
            [LeftOut(**each) for each in contents["left_out"]],
        )
    except (KeyError, TypeError, AttributeError) as error:
        wrong = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no result file of schema {SCHEMA}: {wrong}") from None


def _row(contents: dict[str, Any]) -> Row:
    stored = {each.name: contents[each.name] for each in fields(Row)}
    stored["seconds"] = Seconds(**stored["seconds"])
    stored["limits"] = None if stored["limits"] is None else Limits(**stored["limits"])
    return Row(**stored)
