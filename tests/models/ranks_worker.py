"""One process of the tests of what ranks must agree on: steps whose LayerDrop, masks and lengths differ between ranks.

Started by `tests.models.processes`. With one whose gradients are not those of all ranks, or that waits in vain, the tests fail.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hubert_fast
from hubert_fast.models.encoder import Encoder
from hubert_fast.models.encoder_layer import EncoderLayer, FeedForward, SelfAttention
from tests.models import configurations
from tests.models.processes import WORLD_SIZE, join
from tests.models.twins import LENGTHS, SAMPLES, batch

STEPS = 6
SEED = 3004  # each rank drops other layers: all three in one step, none in another
DROPOUTS = dict.fromkeys(("encoder_attention_dropout", "encoder_ff_interm_dropout"), 0.1)  # in layers alone
# What is wrapped, beside the objective; "above" is a module that holds it.
FSDP2 = ("objective", "above", "layers", "pair of layers", "attention and feed-forward", "encoder")
FSDP1 = ("objective", "layers", "encoder")
CASES = ["ddp", *(f"fsdp2 {each}" for each in FSDP2), *(f"fsdp1 {each}" for each in FSDP1), "fsdp1 flat layers"]


class Above(nn.Module):
    """What a user may wrap, with the objective inside."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, *arguments, **keywords):
        return self.objective(*arguments, **keywords)


def build(case: str) -> hubert_fast.PretrainingObjective:
    """Three layers, of which LayerDrop leaves out a half. Dropout's seeds do not get into what is wrapped below a layer."""
    torch.manual_seed(0)
    dropouts = {} if "attention" in case else DROPOUTS
    settings = configurations.base(encoder_num_layers=3, encoder_layer_drop=0.5, mask_channel_prob=0.3, **dropouts)
    return hubert_fast.PretrainingObjective(hubert_fast.hubert_pretrain_model(**settings).double())


def loss_of(wrapped: nn.Module, objective: nn.Module, rank: int, number: int) -> Tensor:
    """The loss of a rank's own batch, mask and random numbers; the first rank once masks nothing."""
    data = batch(torch.float64, LENGTHS.roll(rank), seed=WORLD_SIZE * number + rank)
    mask = torch.zeros(data.labels.shape, dtype=torch.bool)
    mask[:, 3 : 3 if (rank, number) == (0, 1) else 12] = True
    if number == 0:  # later steps go on from what those before them have drawn
        torch.manual_seed(SEED + rank)
    plan = objective.plan(data.labels, data.lengths, samples=SAMPLES, device="cpu", mask=mask)
    return wrapped(data.waveforms, plan=plan).loss


def _wrap(objective: nn.Module, case: str) -> nn.Module:
    kind, _, where = case.partition(" ")
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(objective)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = {"layers": {EncoderLayer}, "encoder": {Encoder}}.get(where.split()[-1])
        return FullyShardedDataParallel(
            objective,
            auto_wrap_policy=None if policy is None else ModuleWrapPolicy(policy),
            use_orig_params="flat" not in where,
            device_id=torch.device("cpu"),
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    encoder = objective.model.wav2vec2.encoder
    layers = list(encoder.transformer.layers)
    parts = [each for each in encoder.modules() if isinstance(each, (SelfAttention, FeedForward))]
    inner = {
        "layers": layers,
        "pair of layers": [layers[:2]],
        "attention and feed-forward": parts,
        "encoder": [encoder],
    }
    for each in inner.get(where, []):
        fully_shard(each, mesh=mesh)
    return fully_shard(Above(objective) if where == "above" else objective, mesh=mesh)


def _whole(wrapped: nn.Module, case: str) -> dict[str, Tensor]:
    """The weights, put together again."""
    whole = nullcontext()
    if case.startswith("fsdp1"):
        whole = type(wrapped).summon_full_params(wrapped)
    with whole:
        return {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module.").removeprefix("objective."): (
                each.full_tensor() if hasattr(each, "full_tensor") else each
            ).detach().clone()
            for name, each in wrapped.named_parameters()
        }  # fmt: skip


def main(rank: int, folder: Path) -> None:
    """Every case in one process: starting one costs more than all of them."""
    join(rank, folder)
    found = {}
    for case in CASES:
        objective = build(case)
        wrapped = _wrap(objective, case)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
        losses = []
        for number in range(STEPS):  # gradients add up
            losses.append(loss_of(wrapped, objective, rank, number))
            losses[-1].backward()
        optimizer.step()
        found[case] = torch.stack(losses).detach(), _whole(wrapped, case)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
