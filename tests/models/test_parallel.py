"""DDP and FSDP2 on two gloo processes give the gradients of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.models.parallel_worker import CASES, WORLD_SIZE, build, whole_batch
from tests.models.twins import assert_gradients_match, gradients

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The gradients of both processes, averaged, for each case."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), environment.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.parallel_worker", str(rank), str(folder)],
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
    return {case: torch.load(folder / "{}-{}.pt".format(*case), weights_only=True) for case in CASES}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_two_processes_give_the_gradients_of_one(kind, name, averaged):
    """The loss is a sum over rows except for the penalty, a mean over the rows times the frames masked in them.

    Both halves here have the same size and as many masked frames, so the sum over processes is the whole; both wrappers
    average instead, hence the factor.
    """
    objective = build(name)
    halves = []
    data, mask = whole_batch()
    for rows in (slice(0, 2), slice(2, 4)):
        halves.append(objective(*(each[rows] for each in data), mask=mask[rows]).loss)
    whole = objective(*data, mask=mask).loss
    torch.testing.assert_close(sum(halves), whole, rtol=1e-10, atol=0)
    whole.backward()
    summed = {key: WORLD_SIZE * grad for key, grad in averaged[kind, name].items()}
    assert_gradients_match(summed, gradients(objective), 1e-10)
