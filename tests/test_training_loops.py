"""The loops of docs/training-loops.md and examples/ run with one process and with two, and train to the same weights.

LayerDrop is on where ranks might wait for one another, and nowhere is DDP told to look for unused parameters.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.utils import _recursive_to

from tests import extras
from tests.models.processes import WORLD_SIZE, run_all
from tests.training_loops_worker import CPU, RECIPES, absent, build, micro_batch, weights

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of two found, by part; what is for one process only one of them did."""
    folder = tmp_path_factory.mktemp("loops")
    run_all("tests.training_loops_worker", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def _of(found, part):
    """What the ranks that did a part found."""
    if (module := absent(part)) is not None:
        pytest.skip(extras.reason(module))
    return [each[part] for each in found if part in each]


def _losses(output):
    return {int(update): float(loss) for update, loss in re.findall(r"^update (\d+): .*?\bloss ([\d.]+)", output, re.M)}


def test_the_plain_example_trains_in_one_process(found):
    losses = _losses(_of(found, "train_ddp.py, alone")[0]["output"])
    assert list(losses) == [1, 2, 3] and losses[3] < losses[1]


def test_the_lightning_example_trains_in_one_process_and_goes_on_from_its_checkpoint(found):
    first, then = (_losses(_of(found, f"train_lightning.py, {part}")[0]["output"]) for part in ("alone", "resumed"))
    assert (list(first), list(then)) == ([1, 2], [3, 4])
    assert then[4] < first[1]


@pytest.mark.parametrize("script", ["train_ddp.py", "train_lightning.py"])
def test_an_example_trains_in_two_processes(script, found):
    first, second = (_losses(each["output"]) for each in _of(found, script))
    assert list(first) == [1, 2, 3] and first[3] < first[1]
    assert second == {}


@pytest.mark.parametrize("loop", ["ddp", "lightning"])
def test_two_processes_with_half_of_the_micro_batches_each_train_to_the_weights_of_one(loop, found):
    ranks, (alone,) = _of(found, loop), _of(found, f"{loop}, alone")
    start = weights(build())
    for rank in ranks:
        for name, each in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], each, rtol=0, atol=1e-5)
    assert max(float((each - start[name]).abs().max()) for name, each in alone["weights"].items()) > 1e-2
    if loop == "ddp":  # Lightning's is that of a rank
        torch.testing.assert_close(ranks[0]["losses"], alone["losses"])


@pytest.mark.parametrize("loop", ["ddp, LayerDrop", "lightning, LayerDrop"])
def test_ranks_that_drop_other_layers_agree_on_the_weights(loop, found):
    first, second = _of(found, loop)
    assert (
        first["ran"] != second["ran"] and 0 < len(first["ran"]) < 4 * 3 * 2
    )  # layers, updates, micro-batches of a rank
    for name, each in first["weights"].items():
        assert torch.equal(each, second["weights"][name])


def test_lightning_leaves_labels_lengths_and_mask_on_the_host_and_the_plan_leaves_out_frames(found):
    rank = _of(found, "lightning")[0]
    assert rank["moved"] == ["meta", "meta", "cpu", "cpu", "cpu", "cpu"] and rank["find_unused"] == [False]
    labels, lengths = micro_batch(0)[1:3]
    assert (
        rank["rows, kept"] == [int(((lengths - 400) // 320 + 1).sum()), 27] and rank["rows, kept"][0] < labels.numel()
    )


def test_a_plan_that_ddp_moves_keeps_its_rows():
    waveforms, labels, lengths, mask = micro_batch(0)
    plan = build().plan(labels, lengths, samples=waveforms.shape[1], device=CPU, mask=mask)
    (moved,), *_ = _recursive_to((plan,), torch.device("meta"), False)
    assert type(moved) is type(plan) and moved.mask.device.type == "meta"
    assert (len(moved.mask), len(moved.keep)) == (len(plan.mask), len(plan.keep))


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_of_the_page_trains_in_two_processes_that_agree(heading, found):
    first, second = _of(found, heading)
    assert first["find_unused"] == [False]
    assert first["weights"].keys() == second["weights"].keys()
    for name, each in first["weights"].items():
        assert each.isfinite().all() and torch.equal(each, second["weights"][name])
    if heading != "Fine-tuning":
        for grid, rows, kept in zip(first["grids"], first["rows"], first["kept"], strict=True):
            assert kept < rows < grid
