"""One process of the tests of graphed steps that train together: the same updates by each `KINDS`, and their weights.

Started by `tests.models.processes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hubert_fast
from hubert_fast import GraphedStep
from tests.models.graph_stand_in import replace_capture
from tests.models.processes import WORLD_SIZE, join
from tests.models.test_graphed_step import RANDOM, ROOM, SAMPLES, adamw, build, data

UPDATES, ACCUMULATE = 20, 2
# How the updates are made, and whether the second process starts with other weights.
KINDS = {
    "ddp": False,
    "as-it-runs": False,
    "captured": False,
    "frames-counted-ahead": False,
    "bfloat16": False,
    "other-start": True,
}

Micro = tuple[hubert_fast.models.micro_batch.MicroBatch, hubert_fast.models.plan.StepPlan, Tensor]
Update = Callable[[list[Micro], float], None]


def by_ddp(objective: nn.Module) -> Update:
    """As in `hubert_fast.pretrain.training_loop`."""
    optimizer = adamw(objective)
    parallel = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True, gradient_as_bucket_view=True)

    def update(micro: list[Micro], masked_frames: float) -> None:
        for i, (_, plan, waveforms) in enumerate(micro):
            with parallel.no_sync() if i + 1 < len(micro) else nullcontext():
                (parallel(waveforms, plan=plan).loss * (WORLD_SIZE / masked_frames)).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def by_graphs(objective: nn.Module, kind: str) -> Update:
    step = GraphedStep(
        objective,
        adamw(objective),
        clip_norm=1.0,
        capacities=ROOM,
        process_group=dist.group.WORLD,
        reduce_dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
    )
    stand_in = replace_capture(step) if kind == "captured" else None
    counted = kind == "frames-counted-ahead"

    def update(micro: list[Micro], masked_frames: float) -> None:
        if stand_in is not None:
            stand_in.spoil()
        step([each for each, _, _ in micro], masked_frames=masked_frames if counted else None)

    return update


def micro_batches(objective: nn.Module, rank: int, update: int) -> list[Micro]:
    planner = hubert_fast.models.micro_batch.MicroBatchPlanner(objective, ROOM)
    found = []
    for i in range(ACCUMULATE):
        seed = 100 * update + 10 * i + rank
        waveforms, labels, lengths = data(seed)
        torch.manual_seed(seed)
        micro = planner(waveforms, labels, lengths)
        rows, kept = micro.capacity[:2]
        torch.manual_seed(seed)
        plan = objective.plan(labels, lengths, samples=SAMPLES, device="cpu", rows=rows, kept=kept)
        found.append((micro, plan, waveforms))
    return found


def after_a_start_alone(rank: int, *, join_later: bool) -> dict[str, Tensor]:
    """Weights after updates of both processes that follow upon some of each alone, the first in a group of its own.

    With ``join_later`` one `GraphedStep` makes them all.
    """
    objective = build()
    optimizer = torch.optim.SGD(objective.parameters(), 2**-10, fused=True)  # has no state that could differ
    step = GraphedStep(objective, optimizer, capacities=ROOM)
    replace_capture(step)

    def update(number: int) -> None:
        step([micro for micro, _, _ in micro_batches(objective, rank, number)])

    for number in range(3):  # captured, and without LayerDrop all in one
        update(number)
    if rank == 0:
        step.join(dist.new_group([0], use_local_synchronization=True))
        update(3)
    if join_later:
        with mock.patch.object(dist, "get_backend", lambda group: "nccl"):  # whose counts pass through another group
            step.join(dist.group.WORLD)
    else:
        step = GraphedStep(objective, optimizer, capacities=ROOM, process_group=dist.group.WORLD)
    for number in range(4, 7):
        update(number)
    return objective.state_dict()


def main(rank: int, folder: Path) -> None:
    """Every kind in one process: starting one costs more than all of them."""
    join(rank, folder)
    weights = {}
    for kind, differs in KINDS.items():
        objective = build(**RANDOM)
        if differs and rank > 0:
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter.mul_(1.1)
        update = by_ddp(objective) if kind == "ddp" else by_graphs(objective, kind)
        for i in range(UPDATES):
            micro = micro_batches(objective, rank, i)
            masked_frames = torch.tensor(float(sum(each.masked_frames for each, _, _ in micro)))
            dist.all_reduce(masked_frames)
            torch.manual_seed(1000 + 10 * i + rank)  # LayerDrop leaves out other layers on each rank
            update(micro, masked_frames.item())
        weights[kind] = objective.state_dict()
    weights["joins-later"] = after_a_start_alone(rank, join_later=True)
    weights["joins-at-once"] = after_a_start_alone(rank, join_later=False)
    torch.save(weights, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
