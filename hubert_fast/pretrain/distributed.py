"""One process of a run, alone or one of several that ``torchrun`` started.

Two kinds of messages pass between processes. Gradients go through the default group: NCCL between GPUs, Gloo on CPUs.
Small host-side numbers and objects go through a Gloo group of their own: counting masked frames then never waits for a
GPU, and its time limit is long, because the stages that only rank 0 works on (k-means, features) may take hours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_HOST_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Process:
    """This process's place in the run and its device; by default, the only process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    """Gloo group of all ranks; None in a run of one process"""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.rank == 0

    def sum_on_host(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks of ``values`` (of one length on every rank), in float64."""
        if self.host_group is None:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` in rank order, on rank 0; an empty list on the others."""
        if self.host_group is None:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, group=self.host_group)
        return gathered or []

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.host_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum_on_host([0.0])


@contextmanager
def joined(device: str = "cpu") -> Iterator[Process]:
    """This process as ``torchrun`` describes it in RANK, WORLD_SIZE and LOCAL_RANK; without them, the only process.

    ``device`` is "cpu" or "cuda"; each rank takes the GPU of its local rank. A process group that exists already is
    used and left standing, one made here is torn down when the block ends.

    Raises:
        ValueError: for another device, a missing GPU or torchrun variables that contradict each other.
    """
    rank, world_size, local_rank = _torchrun_variables()
    target = _device(device, local_rank)
    exists = dist.is_initialized()
    if exists:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        yield Process(target)
        return
    if not exists:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    host_group = dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)
    try:
        yield Process(target, rank, world_size, host_group)
    finally:
        dist.destroy_process_group(host_group if exists else None)


def _torchrun_variables() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return 0, 1, int(given.get("LOCAL_RANK", 0))
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK must lie in [0, WORLD_SIZE), got RANK={rank}, WORLD_SIZE={world_size}")
    return rank, world_size, int(given.get("LOCAL_RANK", rank))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device must be 'cpu' or 'cuda', got {name!r}")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device 'cuda' needs a GPU for local rank {local_rank}, but {torch.cuda.device_count()} are visible; "
            "start fewer processes or pass device 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
