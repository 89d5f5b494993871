"""Processes that train together, each a fresh interpreter: process groups do not survive a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

REPOSITORY = Path(__file__).parents[2]
WORLD_SIZE = 2


def run_all(module: str, folder: Path) -> None:
    """Run ``python -m MODULE RANK FOLDER`` for each rank; their output is the message where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(folder)],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD_SIZE)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def join(rank: int, folder: Path) -> None:
    """Make the default process group, gloo, of such a process."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=90))
