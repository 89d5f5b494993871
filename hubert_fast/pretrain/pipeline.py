"""The main job, stage by stage: scan, then for each iteration units, training and evaluation, then the report.

Each stage leaves files in the run directory and is skipped where its files are there and its settings are the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hubert_fast.pretrain.config import IterationConfig, PretrainConfig, config_path
from hubert_fast.pretrain.config_file import differences, read_config, write_config
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.evaluate import evaluate
from hubert_fast.pretrain.features import FeatureSource, HubertFeatures, MfccFeatures
from hubert_fast.pretrain.manifest import scan
from hubert_fast.pretrain.report import write_report
from hubert_fast.pretrain.run_record import record_start
from hubert_fast.pretrain.trainer import TrainResult, train, weights_path
from hubert_fast.pretrain.units import make_units

# What may change when a run is resumed: it decides no number of the result.
_FREE_ON_RESUME = ("device", "logging.", "data.workers")


class RunExistsError(FileExistsError):
    """The run directory holds a run, and nobody asked to go on with it."""


class ConfigMismatchError(ValueError):
    """A run is to be resumed with other settings than its own."""


@dataclass(frozen=True)
class Run:
    """A run directory, its settings, and this process's part in it.

    Rank 0 does all that is not training, while the others wait for it.
    """

    directory: Path
    config: PretrainConfig
    process: Process
    progress: bool = True

    @property
    def manifest(self) -> Path:
        return self.directory / "manifest"

    def iteration_directory(self, number: int) -> Path:
        return self.directory / f"iteration{number}"

    def settings(self, number: int) -> IterationConfig:
        """The settings of iteration ``number``, counted from 1 among those that have steps."""
        iterations = self.config.iterations()
        if not 1 <= number <= len(iterations):
            raise ValueError(f"iteration must be in [1, {len(iterations)}], the iterations that have steps; got {number}")
        return iterations[number - 1]

    def scan(self, audio: Path) -> None:
        """The manifest of the audio below ``audio``."""
        if self.process.is_main:
            scan(
                audio,
                self.manifest,
                min_seconds=self.config.data.min_seconds,
                valid_fraction=self.config.data.valid_fraction,
                seed=self.config.seed,
                workers=self.config.data.workers,
                progress=self.progress,
            )
        self.process.barrier()

    def units(self, number: int) -> None:
        """The units that iteration ``number`` predicts."""
        settings = self.settings(number)
        self._require(self.manifest / "summary.json", "scan")
        if self.process.is_main:
            make_units(
                self.manifest,
                self._features(number),
                settings.units,
                self.iteration_directory(number) / "units",
                seed=self.config.seed,
                progress=self.progress,
            )
        self.process.barrier()

    def train(self, number: int, *, resume: bool) -> TrainResult:
        """The model of iteration ``number``; one that is trained is kept."""
        settings = self.settings(number)
        directory = self.iteration_directory(number)
        resume = resume or weights_path(directory / "train").exists()
        self._require(directory / "units" / "summary.json", "units")
        return train(
            settings.model,
            self.config.data_of(settings),
            settings.optimizer,
            settings.objective,
            self.config.logging,
            manifest_dir=self.manifest,
            units_dir=directory / "units",
            out=directory / "train",
            seed=self.config.seed,
            resume=resume,
            autocast=self.config.autocast,
            progress=self.progress,
            process=self.process,
        )

    def evaluate(self, number: int) -> None:
        """Scores of iteration ``number`` on the held-out part."""
        self._require(weights_path(self.iteration_directory(number) / "train"), "train")
        if self.process.is_main:
            evaluate(
                self.iteration_directory(number),
                self.manifest,
                seed=self.config.seed,
                device=str(self.process.device),
                autocast=self.config.autocast,
                normalize_audio=self.config.data.normalize_audio,
                progress=self.progress,
                **dataclasses.asdict(self.config.evaluation),
            )
        self.process.barrier()

    def report(self) -> Path:
        """RUN/report.html."""
        path = write_report(self.directory) if self.process.is_main else self.directory / "report.html"
        self.process.barrier()
        return path

    def everything(self, audio: Path, *, resume: bool) -> Path:
        """All stages in order; returns the report."""
        self.scan(audio)
        for number in range(1, len(self.config.iterations()) + 1):
            self.units(number)
            self.train(number, resume=resume)
            self.evaluate(number)
            self.report()  # after each iteration: a long run can be read while it goes on
        return self.directory / "report.html"

    def _features(self, number: int) -> FeatureSource:
        layer = self.settings(number).units.layer
        if layer == 0:
            return MfccFeatures()
        if number == 1:
            raise ValueError(f"units.layer of the first iteration must be 0 (MFCC); got {layer}: there is no model before it")
        weights = weights_path(self.iteration_directory(number - 1) / "train")
        self._require(weights, "train")
        return HubertFeatures(
            weights,
            layer,
            device=self.process.device,
            autocast=self.config.autocast,
            normalize_audio=self.config.data.normalize_audio,
        )

    def _require(self, path: Path, stage: str) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the stage `hubert-fast {stage}` first")


def open_run(
    directory: Path, config: PretrainConfig, command: list[str], process: Process, *, resume: bool, progress: bool = True
) -> Run:
    """A new run directory, or one to go on with.

    Raises:
        RunExistsError: the directory holds something, and ``resume`` is False.
        ConfigMismatchError: it holds a run with other settings.
    """
    directory = Path(directory)
    path = config_path(directory)
    if process.is_main:
        if path.exists():
            if not resume:
                raise RunExistsError(
                    f"out={str(directory)!r} holds a run already; go on with it by --resume, or choose another folder"
                )
            _require_same(read_config(path, PretrainConfig()), config, directory)
        elif directory.exists() and any(directory.iterdir()):
            raise RunExistsError(f"out={str(directory)!r} exists, is not empty and holds no run; choose another folder")
        write_config(path, config)
        record_start(directory, command)
    process.barrier()
    return Run(directory, config, process, progress=progress and process.is_main)


def _require_same(stored: PretrainConfig, given: PretrainConfig, directory: Path) -> None:
    changed = [
        f"{name} is {before!r} there and {now!r} here"
        for name, before, now in differences(stored, given)
        if not name.startswith(_FREE_ON_RESUME) and not name.endswith(".accumulate")
    ]
    if changed:
        raise ConfigMismatchError(
            f"out={str(directory)!r} holds a run with other settings ({'; '.join(changed)}); resume it with its own, or "
            "choose another folder"
        )
