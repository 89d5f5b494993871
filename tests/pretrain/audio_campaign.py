"""Mutated audio files through the scan, each taken length against a second decoder's (ffmpeg, by PyAV).

    python -m tests.pretrain.audio_campaign --files 2000 --seed 0

Exits 1 where a file was taken wrongly, or the scan crashed or hung. A file is taken rightly if the scan counts as many samples
as the second decoder, and every part of it decodes to the same bits as the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from hubert_fast.pretrain.audio_error import AudioError
from hubert_fast.pretrain.decoding import decode
from hubert_fast.pretrain.probe import probe
from tests.pretrain.mutated_audio import Mutated, mutate

_TIME_LIMIT = 20.0
_PARTS = 3
_MP3_DELAY = 576 + 529  # of the encoder that is used here, and of any decoder


@dataclass(frozen=True)
class Verdict:
    """What became of one file: ``outcome`` is "right", "wrong", "left out", "crash" or "hang"."""

    file: Mutated
    outcome: str
    detail: str
    whole: bool
    """whether the second decoder found nothing wrong with it"""


def campaign(files: int, seed: int) -> Iterator[Verdict]:
    """The verdict on each of ``files`` mutated files."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(_Worker()) as worker:
        for index in range(files):
            # A generator for each file: any one of them can be made again alone.
            rng = np.random.default_rng([seed, index])
            yield _judge(worker, Path(folder), index, mutate(rng))


def _judge(worker: _Worker, folder: Path, index: int, file: Mutated) -> Verdict:
    path = folder / f"{index}.{file.suffix}"
    path.write_bytes(file.content)
    taken = worker.ask(_scan, path, index)
    other = worker.ask(_second_decoder, file.parts)
    path.unlink()
    whole = isinstance(other, _Decoded) and other.errors == 0
    if isinstance(taken, str):
        outcome = taken if taken in ("crash", "hang") else "left out"
        return Verdict(file, outcome, taken, whole)
    samples, rate, repair, difference = taken
    detail = f"{samples} samples at {rate} Hz, {file.samples} were encoded ({repair}); the second decoder: {other}"
    # The decoder leaves out frames that it cannot make sense of, and rounds otherwise behind them.
    if difference > (1e-6 if file.suffix == "mp3" and file.damaged else 0):
        return Verdict(file, "wrong", f"its parts differ from the whole by {difference}: {detail}", whole)
    tolerance = _tolerance(file, rate, other)
    right = abs(samples - file.samples) <= tolerance
    if isinstance(other, _Decoded):
        expected = sum(found * rate / other_rate for other_rate, found in other.samples.items())
        right |= abs(samples - expected) <= tolerance
    return Verdict(file, "right" if right else "wrong", detail, whole)


def _tolerance(file: Mutated, rate: int, other: _Decoded | str) -> int:
    """Samples by which the lengths may differ: none, but in a damaged MP3. Of its frames the one that has a part missing may
    be counted or not, and so may those that the second decoder refuses: up to two at a time. And its header may no longer
    say what the encoder put before the audio.
    """
    if file.suffix != "mp3" or not file.damaged:
        return 0
    refused = other.errors if isinstance(other, _Decoded) else 0
    return (1152 if rate >= 32_000 else 576) * max(1, 2 * refused) + (_MP3_DELAY if "flipped" in file.name else 0)


def _scan(path: Path, seed: int) -> Any:
    """(samples, rate, repair, by how much its parts differ from the whole), or the reason why it is left out."""
    try:
        info = probe(path)
    except AudioError as error:
        return error.reason
    rate, whole = decode(path, 0, info.samples)
    if (rate, len(whole)) != (info.rate, info.samples):
        return info.samples, info.rate, info.repair, float("inf")
    difference = 0.0
    rng = np.random.default_rng(seed)
    for start in rng.integers(0, info.samples, _PARTS):
        stop = int(rng.integers(start, info.samples)) + 1
        part = decode(path, int(start), stop - int(start))[1]
        same_shape = part.shape == whole[start:stop].shape
        difference = max(difference, float(np.abs(part - whole[start:stop]).max()) if same_shape else float("inf"))
    return info.samples, info.rate, info.repair, difference


@dataclass
class _Decoded:
    """What the second decoder made of a file; ``errors`` counts packets that it could not decode."""

    samples: dict[int, int]
    """by sampling rate, in Hz"""
    errors: int = 0


def _second_decoder(parts: tuple[bytes, ...]) -> _Decoded | str:
    av.logging.set_level(av.logging.PANIC)
    result = _Decoded({})
    for part in parts:
        try:
            with av.open(io.BytesIO(part)) as container:
                for packet in container.demux(container.streams.audio[0]):
                    try:
                        frames = packet.decode()
                    except av.FFmpegError:
                        result.errors += 1
                        continue
                    for frame in frames:
                        before = result.samples.get(frame.sample_rate, 0)
                        result.samples[frame.sample_rate] = before + frame.samples
        except (av.FFmpegError, IndexError) as error:
            return f"cannot read it ({error})"
    return result


class _Worker:
    """A process that may crash or hang, and is replaced then."""

    def __init__(self) -> None:
        self._process: multiprocessing.process.BaseProcess | None = None

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns, "crash" or "hang"."""
        if self._process is None:
            context = multiprocessing.get_context("fork")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_work, args=(other,), daemon=True)
            self._process.start()
            other.close()
        self._connection.send((function, arguments))
        try:
            if self._connection.poll(_TIME_LIMIT):
                return self._connection.recv()
        except EOFError:
            self.close()
            return "crash"
        self.close()
        return "hang"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _work(connection: Any) -> None:
    # The decoders' complaints about mutated files are not the campaign's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        function, arguments = connection.recv()
        connection.send(function(*arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="one line for each file")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for index, verdict in enumerate(campaign(options.files, options.seed)):
        outcome = verdict.outcome
        if outcome == "left out":
            outcome += " (the second decoder finds no fault)" if verdict.whole else " (nor does the second decode all)"
        counts[outcome] += 1
        by_kind[verdict.file.name.split(", ")[1]][outcome] += 1
        if options.verbose or verdict.outcome in ("wrong", "crash", "hang"):
            print(f"{index} {verdict.file.name}: {verdict.outcome}: {verdict.detail}", flush=True)
    for name, each in [("all", counts), *sorted(by_kind.items())]:
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in each.most_common()))
    return 1 if any(counts[outcome] for outcome in ("wrong", "crash", "hang")) else 0


if __name__ == "__main__":
    raise SystemExit(main())
