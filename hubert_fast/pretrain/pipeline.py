"""The main job, stage by stage: scan, then for each iteration units, training and evaluation, then the report.

Each stage leaves files in the run directory and is skipped where its files are there and its settings are the same.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubert_fast.pretrain.audio_folder import find_audio
from hubert_fast.pretrain.config import IterationConfig, PretrainConfig, config_path
from hubert_fast.pretrain.config_checks import check_config
from hubert_fast.pretrain.config_file import read_config, write_config
from hubert_fast.pretrain.corpus_checks import check_corpus
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.evaluate import evaluate
from hubert_fast.pretrain.features import FeatureSource, HubertFeatures, MfccFeatures
from hubert_fast.pretrain.forget import forgotten
from hubert_fast.pretrain.make_units import make_units
from hubert_fast.pretrain.progress import say
from hubert_fast.pretrain.report import write_report
from hubert_fast.pretrain.resume_checks import is_trained, require_resumable
from hubert_fast.pretrain.run_record import record, recorded
from hubert_fast.pretrain.scan import scan
from hubert_fast.pretrain.tensor_files import naming
from hubert_fast.pretrain.trainer import train, weights_path

EMBEDDED_CORPUS = Path(__file__).parent / "embedded_corpus"
"""The folder of the speech that comes with the package: 16 kHz mono Ogg Vorbis files, ``alignments.jsonl`` and
``splits.json``. Its README.md says how it was made."""


class RunExistsError(FileExistsError):
    """The run directory holds a run, and nobody asked to go on with it."""


@dataclass(frozen=True)
class Run:
    """A run directory, its settings and audio, and this process's part in it.

    Rank 0 does all that is not training, while the others wait for it.
    """

    directory: Path
    config: PretrainConfig
    process: Process
    audio: Path
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
            raise ValueError(
                f"iteration must be in [1, {len(iterations)}], the iterations that have steps; got {number}"
            )
        return iterations[number - 1]

    def scan(self) -> None:
        """The manifest of the audio, and what speaks against it.

        Raises:
            ValueError: the audio, or what is usable of it, is not enough for the settings.
        """
        config, options = self.config, {"seed": self.config.seed, "progress": self.progress}

        def work() -> None:
            scan(self.audio, self.manifest, config.data, forgotten=forgotten(self.directory), **options)
            for warning in check_corpus(config, self.manifest, self.process.world_size):
                say(f"warning: {warning}")

        self.process.on_main(work)

    def units(self, number: int) -> None:
        """The units that iteration ``number`` predicts."""
        settings, config = self.settings(number), self.config
        units = self.iteration_directory(number) / "units"
        options = {
            "seed": config.seed,
            "max_bad_utterances": config.data.max_bad_utterances,
            "trained": is_trained(units.parent),
            "workers": config.data.workers,
            "progress": self.progress,
        }

        def work() -> None:
            self._require(self.manifest / "summary.json", "scan")
            source = self._features(number)
            with naming(units):
                make_units(self.manifest, source, settings.units, units, forgotten=forgotten(self.directory), **options)

        self.process.on_main(work)

    def train(self, number: int, *, resume: bool) -> dict[str, Any]:
        """The model of iteration ``number``; one that is trained is kept. Returns the outcome, as `trainer.train` does."""
        directory = self.iteration_directory(number)

        def resumes() -> bool:
            self._require(directory / "units" / "summary.json", "units")
            return resume or weights_path(directory / "train").exists()

        outcome = train(
            self.config,
            self.settings(number),
            manifest_dir=self.manifest,
            units_dir=directory / "units",
            out=directory / "train",
            process=self.process,
            forgotten=self.process.on_main(lambda: forgotten(self.directory)),
            resume=self.process.on_main(resumes),
            progress=self.progress,
        )
        gc.collect()  # imports inside the first training keep its frames, and so all of its memory on a GPU, in a cycle
        return outcome

    def evaluate(self, number: int) -> None:
        """Scores of iteration ``number`` on the held-out part."""
        settings, directory = self.settings(number), self.iteration_directory(number)

        def work() -> None:
            self._require(weights_path(directory / "train"), "train")
            options = {"device": self.process.device, "progress": self.progress, "forgotten": forgotten(self.directory)}
            evaluate(directory, self.manifest, self.config, settings, **options)

        self.process.on_main(work)

    def report(self) -> Path:
        """RUN/report.html."""
        return self.process.on_main(lambda: write_report(self.directory))

    def everything(self, *, resume: bool) -> Path:
        """All stages in order; returns the report."""
        self.scan()
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
        # The layer is of the model before, which is fed as it was trained.
        weights = weights_path(self.iteration_directory(number - 1) / "train")
        self._require(weights, "train")
        return HubertFeatures(
            weights,
            layer,
            device=self.process.device,
            autocast=self.config.autocast,
            normalize_audio=self.config.data_of(self.settings(number - 1)).normalize_audio,
        )

    def _require(self, path: Path, stage: str) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the stage `hubert-fast {stage}` first")


def open_run(
    directory: Path,
    config: PretrainConfig,
    process: Process,
    *,
    audio: Path | None = None,
    resume: bool,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Run:
    """A new run directory, or one to go on with. Nothing is written where something is wrong.

    Args:
        audio: folder of speech. Without it, a run that is resumed goes on with its own, a new one takes the embedded
            corpus.
        command: recorded as a start of the run, where given.

    Raises:
        ValueError: a setting is out of range, or ``audio`` is no folder with audio or not that of the resumed run.
        RunExistsError: the directory holds something, and ``resume`` is False.
        ConfigMismatchError: it holds results made with other settings.
    """
    directory = Path(directory)

    def prepare() -> Path:
        check_config(config)
        stands = _stands(directory, resume)
        if stands:
            require_resumable(read_config(config_path(directory), PretrainConfig()), config, directory)
        folder = _audio_of_resumed(directory, audio) if stands else Path(audio or EMBEDDED_CORPUS).resolve()
        if not stands:
            find_audio(folder)  # refuses a folder without audio; the scan makes the list that is used
        write_config(config_path(directory), config)
        record(directory, audio=folder, command=command)
        return folder

    folder = process.on_main(prepare)
    return Run(directory, config, process, folder, progress=progress and process.is_main)


def _stands(directory: Path, resume: bool) -> bool:
    """Whether there is a run to go on with; False where there is nothing."""
    if config_path(directory).exists():
        if resume:
            return True
        raise RunExistsError(
            f"out={str(directory)!r} holds a run already; go on with it by --resume, or choose another folder"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunExistsError(f"out={str(directory)!r} exists, is not empty and holds no run; choose another folder")
    return False


def _audio_of_resumed(directory: Path, given: Path | None) -> Path:
    own = recorded(directory).get("audio")
    if own is None and given is None:
        raise ValueError(
            f"out={str(directory)!r} does not say which audio it is about: `hubert-fast scan --resume --audio FOLDER` does"
        )
    if own is None or given is None:
        return Path(own or given).resolve()
    if given.resolve() != Path(own):
        raise ValueError(
            f"audio={str(given.resolve())!r}, but out={str(directory)!r} holds a run on {own!r}; resume it "
            "without another audio folder, or choose another out"
        )
    return Path(own)
