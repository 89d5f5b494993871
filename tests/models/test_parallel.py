"""DDP and FSDP2 on two gloo processes give the gradients of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist

from tests.models.parallel_worker import CASES, build, whole_batch
from tests.models.processes import WORLD_SIZE, run_all
from tests.models.twins import assert_gradients_match, gradients

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The gradients of both processes, averaged, for each case."""
    folder = tmp_path_factory.mktemp("parallel")
    run_all("tests.models.parallel_worker", folder)
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
