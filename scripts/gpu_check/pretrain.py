"""The main job: its trainer in graphs and eagerly, then a folder of speech in, a HuBERT and its report out; what they reached.

    python -m scripts.gpu_check.pretrain OUT

GPU_CHECK_AUDIO names the folder (else the corpus that comes with the package), GPU_CHECK_PRETRAIN further options of
`hubert-fast pretrain`, such as "--preset base --first.optimizer.steps 400". A run that is stopped tells what it has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional
from unittest import mock

from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.facts import Facts, facts_of_process

if TYPE_CHECKING:
    from hubert_fast.pretrain.config import PretrainConfig
    from hubert_fast.pretrain.pipeline import Run

# Losses of the same batches with the same random numbers, relative.
_NEAR = 0.02
# A CPU, which tries the script, learns nothing.
_ON_CPU = [f"--{which}.optimizer.steps=4" for which in ("first", "second")]
_SAID = re.compile(r"^micro-batches .*", re.MULTILINE)
_GIB = re.compile(r"([\d.]+) of [\d.]+ GiB by prediction|took ([\d.]+) GiB in a trial")


def main() -> int:
    facts = facts_of_process()
    with _folder() as folder:
        same = _compare(facts, folder)
    with _folder() as folder:
        return _everything(facts, folder / "run") or int(not same)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-run-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(facts: Facts, folder: Path) -> bool:
    from hubert_fast.pretrain.distributed import joined
    from hubert_fast.pretrain.pipeline import EMBEDDED_CORPUS, open_run

    audio = Path(os.environ.get("GPU_CHECK_AUDIO") or _as_waves(EMBEDDED_CORPUS, folder / "audio"))
    with joined(DEVICE) as process:
        run = open_run(folder / "run", config(), process, audio=audio, resume=False, progress=False)
        run.scan()
        run.units(1)
        return compare(facts, run)


def config() -> PretrainConfig:
    """A few updates of HuBERT Base; on a CPU of a small model."""
    from hubert_fast.pretrain.presets import PRESETS

    preset = PRESETS["base" if ON_GPU else "tiny"]
    steps, seconds, workers = (60, 175.0, 8) if ON_GPU else (4, 20.0, 1)
    first = preset.first
    optimizer = dataclasses.replace(first.optimizer, steps=steps)
    return dataclasses.replace(
        preset,
        device=DEVICE,
        data=dataclasses.replace(preset.data, batch_seconds=seconds, workers=workers),
        logging=dataclasses.replace(preset.logging, log_every=max(1, steps // 12), valid_every=steps, save_every=steps),
        first=dataclasses.replace(first, optimizer=optimizer, units=dataclasses.replace(first.units, init_attempts=1)),
    )


def compare(facts: Facts, run: Run) -> bool:
    """Train the first iteration of ``run``, whose units are there, in graphs and eagerly; whether the losses agree."""
    losses = {}
    for graphs in ("auto", "off"):
        gc.collect()  # a step of before lies in a cycle, and is not to be freed in the midst of a capture
        try:
            lines, said = _trained(run, graphs)
        except Exception as error:
            facts.note("pretrain", graphs=graphs, failed=f"{type(error).__name__}: {error}"[:300], ok=False)
            continue
        losses[graphs] = [each["loss"] for each in lines if "loss" in each]
        speeds = sorted(each["x_realtime"] for each in lines[1:] if "x_realtime" in each)
        facts.note(
            "pretrain",
            graphs=graphs,
            steps=lines[-1]["step"],
            audio_seconds_per_second=speeds[len(speeds) // 2] if speeds else None,
            said=said,
            **_gib(said),
        )
    if len(losses) < 2:
        return False
    away = max(abs(mine / plain - 1) for mine, plain in zip(losses["auto"], losses["off"], strict=True))
    facts.note("pretrain", graphs="verdict", ok=away <= _NEAR, losses_away=away, **losses)
    return away <= _NEAR


def _trained(run: Run, graphs: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl, and what the trainer said of micro-batches."""
    from hubert_fast.pretrain import trainer

    chosen = dataclasses.replace(run.config, graphs=graphs)
    units, out = run.iteration_directory(1) / "units", run.directory / f"graphs-{graphs}"
    errors = io.StringIO()
    folders = {"manifest_dir": run.manifest, "units_dir": units, "out": out}
    try:
        # A CPU has no graphs: the step is the same, and nothing is captured.
        in_graphs = mock.patch.object(trainer, "runs_in_graphs", lambda *_: graphs == "auto")
        with contextlib.nullcontext() if ON_GPU else in_graphs, contextlib.redirect_stderr(errors):
            trainer.train(chosen, chosen.first, **folders, process=run.process, progress=False)
    finally:
        sys.stderr.write(errors.getvalue())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, _SAID.findall(errors.getvalue())


def _gib(said: list[str]) -> dict[str, Optional[float]]:
    """Bytes predicted for a step, and those that its trial took."""
    found = [match.groups() for each in said for match in _GIB.finditer(each)]
    predicted = next((float(each) for each, _ in found if each), None)
    return {"predicted_gib": predicted, "trial_gib": next((float(each) for _, each in found if each), None)}


def _as_waves(corpus: Path, folder: Path) -> Path:
    """The corpus uncompressed, so that decoding does not decide the speed."""
    import soundfile

    folder.mkdir()
    for path in corpus.glob("*.ogg"):
        waveform, rate = soundfile.read(path, dtype="float32")
        soundfile.write(folder / f"{path.stem}.wav", waveform, rate)
    splits = (corpus / "splits.json").read_text()
    (folder / "splits.json").write_text(splits.replace(".ogg", ".wav"))
    return folder


def _everything(facts: Facts, run: Path) -> int:
    """The exit status of `hubert-fast pretrain`."""
    options = shlex.split(os.environ.get("GPU_CHECK_PRETRAIN", "")) or ([] if ON_GPU else _ON_CPU)
    if os.environ.get("GPU_CHECK_AUDIO"):
        options += ["--audio", os.environ["GPU_CHECK_AUDIO"]]
    try:
        return subprocess.run(
            [sys.executable, "-m", "hubert_fast.cli", "pretrain", "--out", str(run), "--no-progress", *options]
        ).returncode
    finally:
        note_run(facts, run)


def note_run(facts: Facts, run: Path) -> None:
    """What each iteration of ``run`` reached, as far as it came."""
    from hubert_fast.pretrain.run_summary import iterations

    for each in iterations(run):
        reached = each.metrics.outcome()
        if reached.get("seconds"):
            reached["audio_seconds_per_second"] = reached["audio_seconds"] / reached["seconds"]
        facts.note("pretrain", iteration=each.number, **reached, evaluation=each.evaluation)


if __name__ == "__main__":
    sys.exit(main())
