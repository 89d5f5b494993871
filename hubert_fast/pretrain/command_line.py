"""The stages of the main job on the command line: options, settings, and what each stage says when it is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import tyro

from hubert_fast.pretrain.config import PretrainConfig, config_path, resolved_device
from hubert_fast.pretrain.config_file import read_config
from hubert_fast.pretrain.distributed import joined
from hubert_fast.pretrain.embedded import embedded_corpus
from hubert_fast.pretrain.manifest import ManifestSummary
from hubert_fast.pretrain.pipeline import Run, open_run
from hubert_fast.pretrain.presets import PRESETS

_DEFAULT_OUT = Path("hubert-fast-run")
# Commands that may make a new run directory; the others work on one that stands.
_BEGINNINGS = ("pretrain", "scan")


@dataclass(frozen=True)
class Options:
    """What every stage takes."""

    out: Path = _DEFAULT_OUT
    """the run directory"""
    audio: Optional[Path] = None
    """folder of speech: wav, flac, ogg or mp3, any rate and channel count; default: the embedded corpus"""
    preset: Optional[str] = None
    """base, large, xlarge (the paper's recipes) or tiny; default: base, or tiny for the embedded corpus"""
    config: Optional[Path] = None
    """a TOML file with the settings that differ from the preset"""
    resume: bool = False
    """go on with the run in --out"""
    iteration: int = 1
    """which iteration the stages units, train and evaluate are about"""
    progress: bool = True
    """progress bars"""


@dataclass(frozen=True)
class _Arguments:
    """Both groups without a prefix: ``--out``, ``--data.batch-seconds``, ``--first.optimizer.steps``."""

    options: Annotated[Options, tyro.conf.arg(name="")]
    settings: Annotated[PretrainConfig, tyro.conf.arg(name="")]


def run_stage(command: str, arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    options, config = _parse(command, arguments)
    audio = options.audio or _scanned_audio(options.out) or embedded_corpus()
    if command not in _BEGINNINGS and not config_path(options.out).exists():
        raise FileNotFoundError(f"out={str(options.out)!r} holds no run; `hubert-fast scan` or `pretrain` begins one")
    resume = options.resume or command not in _BEGINNINGS
    with joined(resolved_device(config.device)) as process:
        run = open_run(
            options.out,
            config,
            ["hubert-fast", command, *arguments],
            process,
            resume=resume,
            progress=options.progress,
        )
        message = _STAGES[command](run, audio, options)
        if process.is_main:
            print(message)
    return 0


def _scanned_audio(run: Path) -> Optional[Path]:
    """The folder that an earlier scan of this run read."""
    summary = ManifestSummary.load(run / "manifest")
    return None if summary is None else Path(summary.settings["audio"])


def _parse(command: str, arguments: list[str]) -> tuple[Options, PretrainConfig]:
    """Options and settings: those of the preset (or of the run that is resumed), then the file, then the command line."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=sorted(PRESETS))
    early.add_argument("--config", type=Path)
    early.add_argument("--audio", type=Path)
    early.add_argument("--out", type=Path, default=_DEFAULT_OUT)
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(arguments)

    stands = config_path(known.out).exists() and (known.resume or command not in _BEGINNINGS)
    preset = known.preset or ("tiny" if known.audio is None else "base")
    base = PRESETS[preset]
    if stands and known.preset is None:
        base = read_config(config_path(known.out), base)
    if known.config is not None:
        base = read_config(known.config, base)

    parsed = tyro.cli(
        _Arguments,
        prog=f"hubert-fast {command}",
        description=_DESCRIPTIONS[command],
        args=arguments,
        default=_Arguments(Options(), base),
    )
    return parsed.options, parsed.settings


def _pretrain(run: Run, audio: Path, options: Options) -> str:
    return f"report: {run.everything(audio, resume=options.resume)}"


def _scan(run: Run, audio: Path, options: Options) -> str:
    run.scan(audio)
    return f"manifest: {run.manifest}"


def _units(run: Run, audio: Path, options: Options) -> str:
    run.units(options.iteration)
    return f"units: {run.iteration_directory(options.iteration) / 'units'}"


def _train(run: Run, audio: Path, options: Options) -> str:
    result = run.train(options.iteration, resume=options.resume)
    return (
        f"weights: {result.weights}\nloss per masked frame {result.first_loss:.3f} -> {result.last_loss:.3f}, "
        f"masked accuracy {result.first_masked_accuracy:.3f} -> {result.last_masked_accuracy:.3f}"
    )


def _evaluate(run: Run, audio: Path, options: Options) -> str:
    run.evaluate(options.iteration)
    return f"evaluation: {run.iteration_directory(options.iteration) / 'evaluation.json'}"


def _report(run: Run, audio: Path, options: Options) -> str:
    return f"report: {run.report()}"


_STAGES: dict[str, Callable[[Run, Path, Options], str]] = {
    "pretrain": _pretrain,
    "scan": _scan,
    "units": _units,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
}

_DESCRIPTIONS = {
    "pretrain": "Pre-train HuBERT on a folder of speech: manifest, units, training, evaluation, report.",
    "scan": "List the usable audio of a folder in a new run directory.",
    "units": "Make the units that an iteration predicts.",
    "train": "Train an iteration's model; --resume goes on from its newest checkpoint.",
    "evaluate": "Score an iteration's representations on the held-out part.",
    "report": "Write RUN/report.html from what is there.",
}
