"""The main job: a folder of speech in, a HuBERT and its report out; what it reached.

    python -m scripts.gpu_check.pretrain OUT

GPU_CHECK_AUDIO names the folder (else the corpus that comes with the package), GPU_CHECK_PRETRAIN further options of
`hubert-fast pretrain`, such as "--preset base --first.optimizer.steps 400". A run that is stopped tells what it has.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.gpu_check.facts import Facts, facts_of_process


def main() -> int:
    facts = facts_of_process()
    run = Path(tempfile.gettempdir(), f"gpu-check-run-{os.getpid()}")
    options = ["--no-progress", *shlex.split(os.environ.get("GPU_CHECK_PRETRAIN", ""))]
    if os.environ.get("GPU_CHECK_AUDIO"):
        options += ["--audio", os.environ["GPU_CHECK_AUDIO"]]
    code = 1
    try:
        code = subprocess.run(
            [sys.executable, "-m", "hubert_fast.cli", "pretrain", "--out", str(run), *options]
        ).returncode
    finally:
        note_run(facts, run)
        shutil.rmtree(run, ignore_errors=True)
    return code


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
