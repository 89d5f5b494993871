"""The stages of the main job on the command line: options, settings, and what each stage says when it is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import tyro

from hubert_fast.pretrain.config import PretrainConfig, config_path, resolved_device
from hubert_fast.pretrain.config_file import read_config
from hubert_fast.pretrain.distributed import joined
from hubert_fast.pretrain.pipeline import Run, open_run
from hubert_fast.pretrain.presets import PRESETS
from hubert_fast.pretrain.report import write_report

_DEFAULT_OUT = Path("hubert-fast-run")


@dataclass(frozen=True)
class ReportOptions:
    """What every command takes."""

    out: Path = _DEFAULT_OUT
    """the run directory"""


@dataclass(frozen=True)
class BeginningOptions(ReportOptions):
    """Options of the commands that may make a new run directory."""

    audio: Optional[Path] = None
    """folder of speech: wav, flac, ogg or mp3, any rate and channel count; default: the embedded corpus"""
    preset: Optional[str] = None
    """base, large, xlarge (the paper's recipes) or tiny; default: base, or tiny for the embedded corpus"""
    config: Optional[Path] = None
    """a TOML file with the settings that differ from the preset"""
    resume: bool = False
    """go on with the run in --out, on its own audio and with its own settings"""
    progress: bool = True
    """progress bars"""


@dataclass(frozen=True)
class IterationOptions(ReportOptions):
    """Options of a stage of one iteration of a run that stands."""

    iteration: int = 1
    """which iteration, counted from 1 among those that have steps"""
    progress: bool = True
    """progress bars"""


@dataclass(frozen=True)
class TrainOptions(IterationOptions):
    """Options of `train`."""

    resume: bool = False
    """go on from the newest checkpoint"""


def run_stage(command: str, arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    stage = _COMMANDS[command]
    options, config = _parse(command, arguments)
    begins = isinstance(options, BeginningOptions)
    if (not begins or options.resume) and not config_path(options.out).exists():
        raise FileNotFoundError(
            f"out={str(options.out)!r} holds no run; `hubert-fast pretrain` or `scan`, without --resume, begins one"
        )
    if config is None:
        print(f"report: {write_report(options.out)}")
        return 0
    with joined(resolved_device(config.device)) as process:
        run = open_run(
            options.out,
            config,
            process,
            audio=options.audio if begins else None,
            resume=options.resume if begins else True,
            command=["hubert-fast", command, *arguments] if stage.trains else None,
            progress=options.progress,
        )
        message = stage.work(run, options)
        if process.is_main:
            print(message)
    return 0


def _parse(command: str, arguments: list[str]) -> tuple[Any, Optional[PretrainConfig]]:
    """The command's options, and settings where it takes any: those of the preset (or of the run that stands), then
    the file, then the command line.
    """
    stage = _COMMANDS[command]
    program = {"prog": f"hubert-fast {command}", "description": stage.description, "args": arguments}
    if stage.work is None:
        return tyro.cli(stage.options, **program), None
    # Both groups without a prefix: --out, --data.batch-seconds, --first.optimizer.steps.
    unprefixed = tyro.conf.arg(name="")
    groups = [("options", Annotated[stage.options, unprefixed]), ("settings", Annotated[PretrainConfig, unprefixed])]
    both = make_dataclass("Arguments", groups, frozen=True)
    default = both(stage.options(), _settings_before_options(stage.options, arguments))
    parsed = tyro.cli(both, **program, default=default)
    return parsed.options, parsed.settings


def _settings_before_options(options: type, arguments: list[str]) -> PretrainConfig:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", type=Path, default=_DEFAULT_OUT)
    if not issubclass(options, BeginningOptions):
        path = config_path(early.parse_known_args(arguments)[0].out)
        return read_config(path, PretrainConfig()) if path.exists() else PretrainConfig()
    early.add_argument("--preset", choices=sorted(PRESETS))
    early.add_argument("--config", type=Path)
    early.add_argument("--audio", type=Path)
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args(arguments)
    path = config_path(known.out)
    if known.preset is None and known.resume and path.exists():
        base = read_config(path, PretrainConfig())
    else:
        base = PRESETS[known.preset or ("tiny" if known.audio is None else "base")]
    return base if known.config is None else read_config(known.config, base)


def _pretrain(run: Run, options: BeginningOptions) -> str:
    return f"report: {run.everything(resume=options.resume)}"


def _scan(run: Run, options: BeginningOptions) -> str:
    run.scan()
    return f"manifest: {run.manifest}"


def _units(run: Run, options: IterationOptions) -> str:
    run.units(options.iteration)
    return f"units: {run.iteration_directory(options.iteration) / 'units'}"


def _train(run: Run, options: TrainOptions) -> str:
    result = run.train(options.iteration, resume=options.resume)
    text = f"weights: {result.weights}\ntraining loss {result.first_loss:.3f} -> {result.last_loss:.3f}"
    if result.first_masked_accuracy is None or result.last_masked_accuracy is None:
        return text
    return f"{text}, masked accuracy {result.first_masked_accuracy:.3f} -> {result.last_masked_accuracy:.3f}"


def _evaluate(run: Run, options: IterationOptions) -> str:
    run.evaluate(options.iteration)
    return f"evaluation: {run.iteration_directory(options.iteration) / 'evaluation.json'}"


@dataclass(frozen=True)
class _Command:
    description: str
    options: type
    work: Optional[Callable[[Run, Any], str]]
    """None: it needs no settings"""
    trains: bool = False
    """the report names when and on which machine it was started"""


_COMMANDS = {
    "pretrain": _Command(
        "Pre-train HuBERT on a folder of speech: manifest, units, training, evaluation, report.",
        BeginningOptions,
        _pretrain,
        trains=True,
    ),
    "scan": _Command("List the usable audio of a folder in a new run directory.", BeginningOptions, _scan),
    "units": _Command("Make the units that an iteration predicts.", IterationOptions, _units),
    "train": _Command(
        "Train an iteration's model; --resume goes on from its newest checkpoint.", TrainOptions, _train, trains=True
    ),
    "evaluate": _Command("Score an iteration's representations on the held-out part.", IterationOptions, _evaluate),
    "report": _Command("Write RUN/report.html from what is there.", ReportOptions, None),
}
