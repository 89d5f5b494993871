"""One process of a run, alone or one of several that ``torchrun`` started.

Two kinds of messages pass between processes. Gradients go through the default group: NCCL between GPUs, Gloo on CPUs.
Small host-side numbers and objects go through a Gloo group of their own: counting masked frames then never waits for a
GPU, and its time limit is long, because the stages that only rank 0 works on (k-means, features) may take hours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_HOST_TIMEOUT = timedelta(hours=24)
Result = TypeVar("Result")


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

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on rank 0, for which the others wait; every rank returns its result, which must pickle.

        Raises:
            Exception: what ``work`` raised, on rank 0; on the others a RuntimeError with its message, because not every
                exception survives the way there, while ranks that wait in vain would bury the message under their own.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                self.from_main((None, str(error)))
                raise
        result, failure = self.from_main((result, None))
        if failure is not None:
            raise RuntimeError(failure)
        return result

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum_on_host([0.0])


@contextmanager
def joined(device: str = "auto") -> Iterator[Process]:
    """This process as ``torchrun`` describes it in RANK, WORLD_SIZE and LOCAL_RANK; without them, the only process.

    ``device`` is "cpu", "cuda" or "auto", a GPU where there is one; each rank takes the GPU of its local rank.

    Raises:
        ValueError: for a missing GPU, or a RANK that WORLD_SIZE does not allow.
    """
    rank, world_size = 0, 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK must lie in [0, WORLD_SIZE), got RANK={rank}, WORLD_SIZE={world_size}")
    target = _device(device, int(os.environ.get("LOCAL_RANK", rank)))
    if world_size == 1:
        yield Process(target)
        return
    dist.init_process_group("nccl" if target.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        yield Process(target, rank, world_size, dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT))
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"device 'cuda' needs a GPU for local rank {local_rank}, but {torch.cuda.device_count()} are visible; "
            "start fewer processes or pass device 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
