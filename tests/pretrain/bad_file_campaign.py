"""Trainings in which a file is damaged, removed or replaced at a random moment: each must reach its end, and resumed with the
same events it must end with the same bits.

python -m tests.pretrain.bad_file_campaign --runs 20 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file

from hubert_fast.pretrain.checkpoint import checkpoint_path, list_checkpoints
from hubert_fast.pretrain.left_out import read_left_out
from tests.pretrain.train_tiny import make_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24
_LIMIT_SECONDS = 180


def damage(path: Path) -> None:
    """Zeros in the middle of a file whose size and time of change stay: decay, or a drive that fails."""
    state, data = path.stat(), bytearray(path.read_bytes())
    first, last = len(data) // 3, len(data) // 2
    with open(path, "r+b") as file:
        file.seek(first)
        file.write(bytes(last - first))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replace(path: Path) -> None:
    """Other audio of the same length under the same name."""
    audio, rate = soundfile.read(path)
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, len(audio)), rate)


EVENTS = {"damaged": damage, "removed": Path.unlink, "replaced": replace}


def start(corpus: Path, out: Path, ranks: int, **options) -> subprocess.Popen:
    """A training of `train_tiny` in a process of its own, or in several."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    options = {"steps": STEPS, "save_every": 1, "keep": STEPS, **options}
    command = [sys.executable, *launcher, "-m", "tests.pretrain.train_tiny", str(corpus), str(out), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for its end; AssertionError where it fails or hangs."""
    try:
        _, errors = process.communicate(timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("the training hangs") from None
    assert process.returncode == 0, errors


def run(folder: Path, seed: int, ranks: int) -> str:
    """One training with one event, and the same resumed from a checkpoint about the event; returns what happened."""
    rng = random.Random(seed)
    event, corpus, out = rng.choice(list(EVENTS)), make_corpus(folder / "corpus", suffix=".flac"), folder / "whole"
    training = sorted(path for path in (corpus / "audio").glob("*.flac") if path.stem not in ("03", "11"))
    victim, after = rng.choice(training), rng.randrange(STEPS // 2)
    process, began = start(corpus, out, ranks), time.monotonic()
    while len(list_checkpoints(out / "checkpoints")) <= after and process.poll() is None:
        assert time.monotonic() - began < _LIMIT_SECONDS
        time.sleep(0.002)
    EVENTS[event](victim)
    finish(process)
    listed = read_left_out(out)
    assert [line["id"] for line in listed] in ([victim.name], []), listed
    if not listed:
        return f"{victim.name} {event} after step {after}: read no more before the end"
    step = listed[0]["step"]
    resumed, begin = folder / "resumed", rng.randrange(step - 1, STEPS)
    if begin:
        (resumed / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint_path(out / "checkpoints", begin), resumed / "checkpoints")
        shutil.copy(out / "metrics.jsonl", resumed)
    process = start(corpus, resumed, ranks, resume=True)
    finish(process)
    expected, found = (load_file(each / "model.safetensors") for each in (out, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected), f"resumed from {begin}, event at {step}"
    assert read_left_out(resumed) == listed
    return (
        f"{victim.name} {event} after step {after}: left out from step {step} on, resumed from {begin} to the same bits"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failures = 0
    for number in range(options.runs):
        ranks = 1 + number % 2
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = run(Path(folder), options.seed + number, ranks)
            except AssertionError as error:
                failures, said = failures + 1, f"FAILED: {error}"
        print(f"run {number}, ranks {ranks}: {said}", flush=True)
    print(f"{options.runs} runs, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
