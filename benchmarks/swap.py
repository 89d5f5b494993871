"""The swap alone: our model in torchaudio's place, beside torchaudio and transformers, from one second of audio on.

    python -m benchmarks.swap                                  every case, float32 and bfloat16, 1 and 2 threads: some hours
    python -m benchmarks.swap --most-seconds 5 --threads 2     batches of at most 5 seconds
    python -m benchmarks.swap --kinds inference --dtypes float32 --peers torchaudio

A case is timed with all sides in turn, in a process of its own; none of the calls is the first. Inference is
``extract_features``, of transformers its like; training is forward, backward and AdamW, with torchaudio's recipe's loss, of
transformers with the same head written as a good user would. Dropout is on where a side trains; LayerDrop is off. The table has
the worst ratio last.

The exit status is 1 where ours is slower than the fraction ``--at-least`` of a peer's speed or a case was not measured, and 2
where no peer is installed. Training of 8 x 15 s in float32 takes more than 24 GiB with both peers, and less with one.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from hubert_fast.pretrain.atomic import write_text

from . import batches
from .architecture import ARCHITECTURES, Architecture
from .machine import describe
from .models import Models
from .peers import PEERS
from .peers.peer import Setting
from .table import columns
from .training import infer, seconds_of

_OURS = "hubert_fast swapped in"
_NAMES = {"torchaudio": "torchaudio", "transformers": "transformers sdpa"}  # on the command line, and among `PEERS`
_KINDS = "inference", "training"
_DTYPES = "float32", "bfloat16"
_CPU = torch.device("cpu")

# (utterances, seconds of the longest), and whether the others are shorter: the last three quarters as long.
_SHAPES = (
    *(((1, seconds), False) for seconds in (1, 5, 15)),
    *(((4, seconds), padded) for seconds in (1, 5, 10) for padded in (False, True)),
    *(((8, 15), padded) for padded in (False, True)),
)
_SHORTEST = 0.75


@dataclass(frozen=True)
class Case:
    """A comparison of all sides on one batch."""

    kind: str  # "inference" or "training"
    utterances: int
    seconds: float  # of the longest
    padded: bool
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        """Kind, batch, dtype and threads, as the table names the case."""
        padding = ", padded" if self.padded else ""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.kind}, {self.utterances} x {self.seconds:g} s{padding}, {self.dtype}, {threads}"

    def lengths(self) -> list[int]:
        """Samples of each utterance."""
        shortest = _SHORTEST if self.padded else 1.0
        shares = torch.linspace(1.0, shortest, self.utterances).tolist()
        return [round(share * self.seconds * batches.SAMPLE_RATE) for share in shares]


class Result(NamedTuple):
    """Seconds of a case's timed calls, by side."""

    case: Case
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, peer: str) -> float:
        """The peer's median over ours."""
        return statistics.median(self.seconds[peer]) / statistics.median(self.seconds[_OURS])

    def spread(self, peer: str) -> tuple[float, float]:
        """A fifth of the turns has a lower ratio than the first, a fifth a higher one than the second."""
        ratios = sorted(theirs / ours for theirs, ours in zip(self.seconds[peer], self.seconds[_OURS]))
        return ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]

    @property
    def worst(self) -> float:
        """The ratio beside the fastest peer."""
        return min(map(self.ratio, self.peers))

    @property
    def peers(self) -> list[str]:
        """Peers that took part."""
        return [each for each in self.seconds if each != _OURS]


def cases(
    kinds: Sequence[str], dtypes: Sequence[str], threads: Sequence[int], most_seconds: float, least_seconds: float = 0.0
) -> Iterator[Case]:
    """Cases whose batch, padding included, has at least and at most so many seconds of audio, the shortest first."""
    shapes = sorted(_SHAPES, key=lambda each: each[0][0] * each[0][1])
    for ((utterances, seconds), padded), kind, dtype, count in product(shapes, kinds, dtypes, threads):
        if not least_seconds <= utterances * seconds <= most_seconds:
            continue
        yield Case(kind, utterances, seconds, padded, dtype, count)


class Swap:
    """Measures cases of one architecture.

    Args:
        architecture: of all sides.
        num_classes: of their heads.
        seconds: of a case's timed turns, after which no more are begun.
        fewest: turns of a case, however long they take.
        peers: of "torchaudio" and "transformers", those that take part where they are installed.

    Attributes:
        models: of all sides.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int,
        *,
        seconds: float,
        fewest: int,
        peers: Sequence[str] = tuple(_NAMES),
    ) -> None:
        self._architecture, self._num_classes = architecture, num_classes
        self._chosen = [_NAMES[each] for each in peers]
        self._seconds, self._fewest = seconds, fewest
        self.models = Models(_CPU)

    def peers(self) -> list[str]:
        """Names of the chosen peers that are installed."""
        return [name for name in self._chosen if PEERS[name].why_not(self._setting(torch.float32)) is None]

    def measure(self, case: Case) -> Result:
        """Time all sides in turn.

        Raises:
            peers.agreement.DifferentWork: where a peer does other work than ours.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            calls = {name: self._call(name, case) for name in (_OURS, *self.peers())}
            return Result(case, self._in_turn(calls))
        finally:
            torch.set_num_threads(before)
            gc.collect()

    def _in_turn(self, calls: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            seconds_of(call, _CPU)
        until = time.monotonic() + self._seconds
        while len(taken[_OURS]) < self._fewest or time.monotonic() < until:
            for name, call in calls.items():
                taken[name].append(seconds_of(call, _CPU))
        return taken

    def _call(self, name: str, case: Case) -> Callable[[], None]:
        dtype = getattr(torch, case.dtype)
        setting = self._setting(dtype, case.padded)
        self.models.check(PEERS[name], setting)
        model, step = self.models.build(PEERS[name], setting)
        batch = batches.make(case.lengths(), self._architecture, self._num_classes)

        def call() -> None:
            torch.manual_seed(0)  # the same masks on all sides
            if case.kind == "inference":
                infer(model, batch, _CPU, dtype)
            else:
                step(batch, dtype)

        return call

    def _setting(self, dtype: torch.dtype, padded: bool = False) -> Setting:
        return Setting(self._architecture, self._num_classes, _CPU, dtype, padded)


def table(results: Sequence[Result]) -> str:
    """A line a case, the worst ratio last."""
    peers = results[0].peers
    head = ["case", "ours", *(f"x {peer}" for peer in peers), "turns"]
    lines = [head]
    for result in sorted(results, key=lambda each: each.worst, reverse=True):
        ratios = [
            f"{result.ratio(peer):.2f} ({'-'.join(f'{each:.2f}' for each in result.spread(peer))})" for peer in peers
        ]
        ours = result.seconds[_OURS]
        lines.append([result.case.name, f"{1e3 * statistics.median(ours):.0f} ms", *ratios, str(len(ours))])
    return columns(lines)


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="base", help="(default: base)")
    parser.add_argument("--classes", type=int, default=100, help="of the head (default: 100)")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, help="(default: both)")
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=_DTYPES, help="(default: both)")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2), metavar="N", help="(default: 1 2)")
    parser.add_argument("--peers", nargs="+", choices=list(_NAMES), default=list(_NAMES), help="(default: both)")
    parser.add_argument(
        "--most-seconds", type=float, default=120.0, help="of a batch, padding included, at most (default: 120)"
    )
    parser.add_argument(
        "--least-seconds", type=float, default=0.0, help="of a batch, padding included, at least (default: 0)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="after which no more turns of a case begin (default: 20)"
    )
    parser.add_argument(
        "--fewest", type=int, default=3, help="turns of a case at least; short batches want ten (default: 3)"
    )
    parser.add_argument(
        "--at-least", type=float, default=0.97, help="the least ratio for which the exit status is 0 (default: 0.97)"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for all times")
    options = parser.parse_args(arguments)
    if min(options.classes, options.fewest, *options.threads) < 1:
        parser.error("--classes, --fewest and --threads must be at least 1")
    if options.out is not None and not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out must be a file in a folder that can be written to; got {options.out}")
    limits = options.most_seconds, options.least_seconds
    chosen = list(cases(options.kinds, options.dtypes, options.threads, *limits))
    if not chosen:
        parser.error("--most-seconds and --least-seconds must leave a case; got {:g} and {:g}".format(*limits))
    swap = Swap(
        ARCHITECTURES[options.model],
        options.classes,
        seconds=options.seconds,
        fewest=options.fewest,
        peers=options.peers,
    )
    if not swap.peers():
        print(f"benchmarks.swap: not installed: {', '.join(options.peers)}", file=sys.stderr)
        return 2
    for missing in {_NAMES[each] for each in options.peers} - {*swap.peers()}:
        print(f"benchmarks.swap: {missing} is not installed and takes no part", file=sys.stderr)
    results: list[Result] = []
    for case in chosen:
        try:
            results.append(_apart(swap, case))
        except Exception as error:  # a case that fails must not keep the others from being measured
            print(f"{case.name}: not measured: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{case.name}: {results[-1].worst:.2f} times a peer's speed", file=sys.stderr, flush=True)
            if options.out is not None:
                _save(options.out, results)
    if results:
        print(table(results))
    training = [
        each.ratio("torchaudio") for each in results if each.case.kind == "training" and "torchaudio" in each.seconds
    ]
    if training:
        print(f"\ntraining: median x torchaudio {statistics.median(training):.2f}")
    failed = len(chosen) - len(results)
    if failed:
        print(
            f"benchmarks.swap: {failed} of {len(chosen)} cases not measured; one of --peers takes less memory",
            file=sys.stderr,
        )
    slower = sum(each.worst < options.at_least for each in results)
    if slower:
        print(
            f"benchmarks.swap: {slower} of {len(results)} cases below --at-least {options.at_least:g}", file=sys.stderr
        )
    return 1 if failed or slower else 0


def _apart(swap: Swap, case: Case) -> Result:
    """Measure a case in a process of its own, which knows what those before it have checked.

    Raises:
        BrokenProcessPool: where that dies. The system kills what takes too much memory.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result, swap.models.checked = pool.submit(_measure, swap, case).result()
    return result


def _measure(swap: Swap, case: Case) -> tuple[Result, dict]:
    return swap.measure(case), swap.models.checked


def _save(path: Path, results: Sequence[Result]) -> None:
    lines = [{**asdict(each.case), "times": each.seconds} for each in results]
    write_text(path, json.dumps({"machine": describe(_CPU), "cases": lines}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
