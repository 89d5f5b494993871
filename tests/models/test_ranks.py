"""Ranks whose random numbers and batches differ neither wait for each other in vain nor give other numbers than one process."""

import pytest
import torch
import torch.distributed as dist

import hubert_fast
from hubert_fast.models.encoder_layer import EncoderLayer
from tests.models.processes import WORLD_SIZE, run_all
from tests.models.ranks_worker import CASES, STEPS, build, loss_of

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


_STREAM = EncoderLayer.stream


@pytest.fixture
def shard(tmp_path):
    """`fully_shard` in a process group of one."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield fully_shard
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(losses, weights after one step of SGD) of each rank, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_all("tests.models.ranks_worker", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def _alone(case, monkeypatch):
    """(losses of each rank, weights, layers run in each step of each rank) without another process."""
    objective, losses, ran = build(case), [], []
    layers = list(objective.model.wav2vec2.encoder.transformer.layers)

    def stream(layer, *arguments):  # a hook would have the layer called with a grid, whose dropout is another
        ran[-1].append(layers.index(layer))
        return _STREAM(layer, *arguments)

    monkeypatch.setattr(EncoderLayer, "stream", stream)
    for rank in range(WORLD_SIZE):
        for number in range(STEPS):
            ran.append([])
            losses.append(loss_of(objective, objective, rank, number))
            (losses[-1] / WORLD_SIZE).backward()
    torch.optim.SGD(objective.parameters(), lr=1.0).step()
    return torch.stack(losses).detach().view(WORLD_SIZE, STEPS), dict(objective.named_parameters()), ran


@pytest.mark.parametrize("case", CASES)
def test_layers_that_one_rank_drops_and_a_rank_that_masks_nothing_change_no_number(case, found, monkeypatch):
    losses, weights, ran = _alone(case, monkeypatch)
    assert [] in ran and [0, 1, 2] in ran and ran[:STEPS] != ran[STEPS:]
    assert losses[0, 1] == 0
    for rank, (theirs, after) in enumerate(each[case] for each in found):
        torch.testing.assert_close(theirs, losses[rank], rtol=1e-12, atol=0)
        assert after.keys() == weights.keys()
        for name, each in weights.items():
            torch.testing.assert_close(after[name], each.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("part", ["model", "model.wav2vec2", "model.logit_generator"])
def test_a_sharded_part_that_the_objective_does_not_call_is_named(part, shard):
    objective = build("ddp")
    shard(objective.get_submodule(part))
    with pytest.raises(ValueError, match=rf"^objective\.{part} must not be sharded by itself"):
        loss_of(objective, objective, 0, 0)


def test_a_graphed_step_refuses_a_sharded_layer(shard):
    objective = build("ddp")
    shard(objective.model.wav2vec2.encoder.transformer.layers[1])
    with pytest.raises(ValueError, match="objective must not be sharded, nor any part of it"):
        hubert_fast.GraphedStep(objective, torch.optim.SGD(objective.parameters()))
