"""One process of the DDP and FSDP2 tests: its share of the batch, and the gradients that come out.

Started by `tests.models.processes`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hubert_fast
from tests.models import configurations
from tests.models.processes import WORLD_SIZE, join
from tests.models.twins import Batch, num_frames

SAMPLES = 8000
CASES = [(kind, name) for kind in ("ddp", "fsdp2") for name in ("base", "xlarge-bias")]


def build(name: str) -> hubert_fast.PretrainingObjective:
    torch.manual_seed(0)
    model = hubert_fast.hubert_pretrain_model(**configurations.ALL[name]).double()
    return hubert_fast.PretrainingObjective(model, unmasked_weight=0.3)


def whole_batch() -> tuple[Batch, Tensor]:
    """Four rows with lengths, and a mask made ahead, as a data loader would."""
    generator = torch.Generator().manual_seed(1)
    waveforms = torch.randn(4, SAMPLES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, configurations.NUM_CLASSES, (4, num_frames(SAMPLES)), generator=generator)
    lengths = torch.tensor([8000, 5000, 8000, 6100])
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    mask[:, 3:12] = True
    return Batch(waveforms, labels, lengths), mask


def _share(rank: int) -> tuple[Batch, Tensor]:
    data, mask = whole_batch()
    rows = slice(rank * 2, rank * 2 + 2)
    return Batch(*(each[rows] for each in data)), mask[rows]


def _wrap(objective: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(objective)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in objective.model.wav2vec2.encoder.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def gradients_of(wrapped: nn.Module, rank: int) -> dict[str, Tensor]:
    data, mask = _share(rank)
    for _ in range(2):  # a second step finds what the first one left behind
        wrapped.zero_grad()
        wrapped(*data, mask=mask).loss.backward()
    grads = {key.removeprefix("module."): each.grad for key, each in wrapped.named_parameters()}
    return {key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in grads.items()}


def main(rank: int, folder: Path) -> None:
    """Every case in one process: starting one costs more than all of them."""
    join(rank, folder)
    for kind, name in CASES:
        grads = gradients_of(_wrap(build(name), kind), rank)
        if rank == 0:
            torch.save(grads, folder / f"{kind}-{name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
