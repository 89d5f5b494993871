"""Millions of invented utterances through all that a run keeps of them: manifest, split, units, plan of an epoch, resuming.

python -m tests.pretrain.many_utterances --utterances 4000000 --folder /tmp/many
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hubert_fast.models.masking import MaskGenerator
from hubert_fast.pretrain.batches import GlobalBatches
from hubert_fast.pretrain.config import DataConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.file_state import FileState
from hubert_fast.pretrain.forget import forgotten_ids, not_forgotten
from hubert_fast.pretrain.frames import SAMPLE_RATE, num_frames
from hubert_fast.pretrain.left_out import LeftOut
from hubert_fast.pretrain.make_units import choose_utterances
from hubert_fast.pretrain.manifest import Recordings, load_manifest, manifest_path, write_manifest
from hubert_fast.pretrain.splits import held_out_files
from hubert_fast.pretrain.units import Units, new_units

_MASKS = MaskGenerator(8, 0.8, "static", 0.0, 10, False, 1, 0.0, "static", 0.0, 10, False, 1)
_CLASSES = 500


class Measured:
    """Seconds of each stage, and the most memory of the process: its own, and with the pages of files that it has mapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.own = self.mapped = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.own = max(self.own, _bytes(status["RssAnon"]))
        self.mapped = max(self.mapped, _bytes(status["VmHWM"]))
        print(f"{name:<28}{self.seconds[name]:8.1f} s  own {_bytes(status['RssAnon']) / 2**30:5.2f} GiB", flush=True)


def _bytes(kilobytes: str) -> int:
    return 1024 * int(kilobytes.split()[0])


def make(folder: Path, utterances: int, measured: Measured) -> None:
    """The manifests and units of as many utterances as the scan and the unit stage would leave."""
    samples = np.random.default_rng(0).integers(2 * SAMPLE_RATE, 15 * SAMPLE_RATE, utterances)
    with measured.stage("recordings"):
        recordings = Recordings()
        for index, each in enumerate(samples.tolist()):
            name = f"speaker{index % 9973:05d}/common_voice_en_{index:09d}.mp3"
            recordings.add(name, rate=48_000, samples=3 * each, state=FileState(each, 10**18 + index, index))
    with measured.stage("split"):
        held_out = held_out_files(folder, recordings.paths, 0.01, 0)
    for split, chosen in (("train", ~held_out), ("valid", held_out)):
        with measured.stage(f"manifest, {split}"):
            path = manifest_path(folder, split)
            manifest = write_manifest(path, folder, recordings, chosen, lambda path: [], longest_seconds=60.0)
        with measured.stage(f"units, {split}"):
            ends = np.cumsum(num_frames(manifest.samples))
            drawn = np.random.default_rng(1).integers(0, _CLASSES, 10_000)
            with new_units(folder / f"units-{split}.safetensors", manifest, _CLASSES) as units:
                for index in range(len(manifest)):
                    units.put(index, drawn[: ends[index] - (ends[index - 1] if index else 0)])


def resume(folder: Path, measured: Measured, *, epoch: int = 3) -> GlobalBatches:
    """All that a training does before its first batch, in the middle of an epoch."""
    with measured.stage("manifest and units, read"):
        manifest, units = load_manifest(folder, "train"), Units(folder / "units-train.safetensors")
    with measured.stage("units, verified"):
        units.verify()
    with measured.stage("forgotten recordings"):
        recording = manifest.recording_paths()[17]
        left_out = LeftOut(len(units), 0.01, forgotten_ids(units.ids, {recording}))
    with measured.stage("batches"):
        batches = GlobalBatches(manifest, units, DataConfig(), _MASKS, left_out, seed=0, process=Process())
        batches.divide(64)
        batches.capacities()
    with measured.stage("plan of an epoch"):
        batches.load_state_dict({"epoch": epoch, "batch": 1000})
        plan = batches.epoch_plan(epoch)
    assert sum(map(len, plan)) == len(manifest)
    return batches


def choose(folder: Path, measured: Measured) -> None:
    """What else asks for all utterances."""
    manifest = load_manifest(folder, "train")
    with measured.stage("utterances for k-means"):
        wanted = not_forgotten(manifest, {manifest.recording_paths()[17]})
        assert len(wanted) == len(manifest) - 1
        choose_utterances(manifest.samples, wanted, 1_000_000, 0)
    units = Units(folder / "units-train.safetensors")
    with measured.stage("units of another manifest"):
        units.manifest_sha256 = "of another"
        assert (units.places_in(manifest) == np.arange(len(units))).all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=4_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        for work in (
            lambda measured: make(options.folder, options.utterances, measured),
            _resume_and_choose(options.folder),
        ):
            if os.fork() == 0:  # the memory of each is a process's own
                measured = Measured()
                work(measured)
                total = sum(measured.seconds.values())
                print(
                    f"total {total:.1f} s, own {measured.own / 2**30:.2f} GiB, mapped too {measured.mapped / 2**30:.2f} GiB"
                )
                os._exit(0)
            assert os.wait()[1] == 0
    finally:
        shutil.rmtree(options.folder)


def _resume_and_choose(folder: Path):
    def work(measured: Measured) -> None:
        resume(folder, measured)
        choose(folder, measured)

    return work


if __name__ == "__main__":
    main()
