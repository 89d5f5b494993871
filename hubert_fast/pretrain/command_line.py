"""The stages of the main job on the command line: options, settings, and what each stage says when it is done."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import tyro

from hubert_fast.pretrain.config import PretrainConfig, config_path
from hubert_fast.pretrain.config_file import read_config
from hubert_fast.pretrain.distributed import joined
from hubert_fast.pretrain.forget import forget
from hubert_fast.pretrain.pipeline import Run, open_run
from hubert_fast.pretrain.presets import PRESETS
from hubert_fast.pretrain.report import write_report

_DEFAULT_OUT = Path("hubert-fast-run")

# Each command is the dataclass of its options; its docstring is what `--help` says of it, and ``work`` does it and returns
# what is said at the end.


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html from what is there."""

    out: Path = _DEFAULT_OUT
    """the run directory"""


@dataclass(frozen=True)
class Scan(Report):
    """List the usable audio of a folder in a new run directory."""

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

    def work(self, run: Run) -> str:
        run.scan()
        return f"manifest: {run.manifest}"


@dataclass(frozen=True)
class Pretrain(Scan):
    """Pre-train HuBERT on a folder of speech: manifest, units, training, evaluation, report."""

    def work(self, run: Run) -> str:
        return f"report: {run.everything(resume=self.resume)}"


@dataclass(frozen=True)
class Units(Report):
    """Make the units that an iteration predicts."""

    iteration: int = 1
    """which iteration, counted from 1 among those that have steps"""
    progress: bool = True
    """progress bars"""

    def work(self, run: Run) -> str:
        run.units(self.iteration)
        return f"units: {run.iteration_directory(self.iteration) / 'units'}"


@dataclass(frozen=True)
class Evaluate(Units):
    """Score an iteration's representations on the held-out part."""

    def work(self, run: Run) -> str:
        run.evaluate(self.iteration)
        return f"evaluation: {run.iteration_directory(self.iteration) / 'evaluation.json'}"


@dataclass(frozen=True)
class Train(Units):
    """Train an iteration's model; --resume goes on from its newest checkpoint."""

    resume: bool = False
    """go on from the newest checkpoint"""

    def work(self, run: Run) -> str:
        outcome = run.train(self.iteration, resume=self.resume)
        changes = []
        for name, measure in (("training loss", "loss"), ("masked accuracy", "masked_accuracy")):
            first, last = outcome[f"first_{measure}"], outcome[f"last_{measure}"]
            if first is not None and last is not None:  # no accuracy where masked frames have no weight
                changes.append(f"{name} {first:.3f} -> {last:.3f}")
        weights = run.iteration_directory(self.iteration) / "train" / "model.safetensors"
        return f"weights: {weights}\n{', '.join(changes)}"


@dataclass(frozen=True)
class Forget:
    """Take recordings out of a run, for instance because a speaker asks for it; units, checkpoints and weights stay. A training
    that runs learns of it when it is resumed."""

    out: tyro.conf.Positional[Path]
    """the run directory"""
    files: tyro.conf.Positional[tuple[str, ...]]
    """recordings or folders of them, relative to the run's folder of audio or absolute; they need not be there any more"""


_COMMANDS = {each.__name__.lower(): each for each in (Report, Scan, Pretrain, Units, Evaluate, Train, Forget)}
_WITHOUT_SETTINGS = (Report, Forget)


def run_stage(command: str, arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    options, config = _parse(command, arguments)
    begins = isinstance(options, Scan)
    if (not begins or options.resume) and not config_path(options.out).exists():
        raise FileNotFoundError(
            f"out={str(options.out)!r} holds no run; `hubert-fast pretrain` or `scan`, without --resume, begins one"
        )
    if isinstance(options, Forget):
        new = forget(options.out, options.files)
        said = ", ".join(new) or "nothing new"
        _show(f"forgotten: {said}; `hubert-fast pretrain --out {options.out} --resume` goes on")
        return 0
    if config is None:
        _show(f"report: {write_report(options.out)}")
        return 0
    with joined(config.device) as process:
        run = open_run(
            options.out,
            config,
            process,
            audio=options.audio if begins else None,
            resume=options.resume if begins else True,
            # The report names when and on which machine these were started.
            command=["hubert-fast", command, *arguments] if isinstance(options, (Pretrain, Train)) else None,
            progress=options.progress,
        )
        message = options.work(run)
        if process.is_main:
            _show(message)
    return 0


def _show(line: str) -> None:
    """Print what is said at the end; that nobody reads it is no reason to fail."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # or Python would try once more as it ends


def _parse(command: str, arguments: list[str]) -> tuple[Any, Optional[PretrainConfig]]:
    """The command's options, and settings where it takes any: those of the preset (or of the run that stands), then
    the file, then the command line.
    """
    options = _COMMANDS[command]
    program = {"prog": f"hubert-fast {command}", "description": options.__doc__, "args": arguments}
    if options in _WITHOUT_SETTINGS:
        return tyro.cli(options, **program), None
    # Both groups without a prefix: --out, --data.batch-seconds, --first.optimizer.steps.
    unprefixed = tyro.conf.arg(name="")
    groups = [("options", Annotated[options, unprefixed]), ("settings", Annotated[PretrainConfig, unprefixed])]
    both = make_dataclass("Arguments", groups, frozen=True)
    default = both(options(), _settings_before_options(options, arguments))
    parsed = tyro.cli(both, **program, default=default)
    return parsed.options, parsed.settings


def _settings_before_options(options: type, arguments: list[str]) -> PretrainConfig:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", type=Path, default=_DEFAULT_OUT)
    if not issubclass(options, Scan):
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
