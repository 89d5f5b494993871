"""Graphed steps of two gloo processes give the weights of DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.graphed_worker import KINDS
from tests.models.processes import WORLD_SIZE, run_all
from tests.models.test_graphed_step import RANDOM, assert_equal, build

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """Weights of each rank, by kind."""
    folder = tmp_path_factory.mktemp("graphed")
    run_all("tests.models.graphed_worker", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"ddp", "bfloat16"}))
def test_layer_drop_and_accumulation_on_two_ranks_equal_ddp_to_the_bit(kind, weights):
    for mine in weights:
        assert_equal(weights[0]["ddp"], mine[kind])


def test_a_step_that_joins_after_updates_alone_sums_gradients_like_a_new_one(weights):
    for mine in weights:
        assert_equal(weights[0]["joins-at-once"], mine["joins-later"])


def test_gradients_summed_in_bfloat16_are_off_by_its_rounding_and_equal_on_all_ranks(weights):
    assert_equal(weights[0]["bfloat16"], weights[1]["bfloat16"])
    start, ddp, rounded = (
        torch.cat([each.flatten() for each in state.values()])
        for state in (build(**RANDOM).state_dict(), weights[0]["ddp"], weights[0]["bfloat16"])
    )
    error = (rounded - ddp).norm() / (ddp - start).norm()
    assert 0 < error < 0.1, error
