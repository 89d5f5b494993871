"""Train HuBERT in a plain loop, under DistributedDataParallel where there are several processes.

    python examples/train_ddp.py --steps 3 --tiny        a CPU, in seconds
    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 3 --tiny
    torchrun --nproc-per-node 8 examples/train_ddp.py --audio DIR --out RUN

Data and models are those of train_graphed.py beside this file; what --audio takes and what is predicted is told there. An update
takes the same number of micro-batches whatever the number of processes, which share them. See docs/training-loops.md.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from train_graphed import CLASSES, SAMPLE_RATE, TINY, Speech, divided, frames, padded, validate

from hubert_fast import PretrainingObjective, hubert_pretrain_base

MicroBatch = tuple[Tensor, Tensor, Tensor, Tensor]  # waveforms, labels, audio_lengths, mask; all on the CPU


class Collate:
    """Makes a padded batch and draws its mask, in the loader's workers."""

    def __init__(self, objective: PretrainingObjective) -> None:
        # On the CPU: what lies on a GPU a forked worker must not touch.
        self.masks = copy.deepcopy(objective.model.mask_generator).cpu()

    def __call__(self, utterances: list[tuple[Tensor, Tensor]]) -> MicroBatch:
        waveforms, labels, lengths = padded(utterances)
        return waveforms, labels, lengths, self.masks.draw(*labels.shape, frames(lengths))


class Share:
    """The batches of this process, in another order each epoch: a batch sampler. All processes have as many."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches, self.epoch = batches, 0

    @property
    def sampler(self) -> Share:
        """Itself: Lightning calls ``set_epoch`` of what has this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches) // (dist.get_world_size() if dist.is_initialized() else 1)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return (self.batches[i] for i in order[: len(self) * processes][rank::processes])


def update(
    wrapped: nn.Module,  # the objective, in DistributedDataParallel where there are several processes
    objective: PretrainingObjective,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],  # of this process
    device: torch.device,
) -> Tensor:
    """One step of the optimizer; the loss per masked frame over all micro-batches of all processes. No host waits for it."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    plans = [
        objective.plan(labels, lengths, samples=waveforms.shape[1], device=device, mask=mask)
        for waveforms, labels, lengths, mask in micro_batches
    ]
    masked = torch.stack([plan.masked.sum() for plan in plans]).sum()
    if processes > 1:
        dist.all_reduce(masked)
    loss = torch.zeros((), device=device)
    for i, ((waveforms, *_), plan) in enumerate(zip(micro_batches, plans)):
        is_last = i + 1 == len(plans)
        with nullcontext() if processes == 1 or is_last else wrapped.no_sync():
            with torch.autocast(device.type, torch.bfloat16):
                result = wrapped(waveforms.to(device, non_blocking=True), plan=plan)
            mean = result.loss / masked.clamp(min=1)
            (processes * mean).backward()  # DDP divides the sum of the gradients by the number of processes
        loss += mean.detach()
    nn.utils.clip_grad_norm_(objective.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    if processes > 1:
        dist.all_reduce(loss)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--audio", type=Path, help="folder of wav files (default: synthetic audio)")
    parser.add_argument("--out", type=Path, help="folder of the weights (default: none are kept)")
    parser.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    parser.add_argument("--tiny", action="store_true", help="a small model and short audio, for a CPU")
    args = parser.parse_args()
    micro_batch_seconds, update_micro_batches, log_every = (4, 4, 1) if args.tiny else (80, 16, 100)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if update_micro_batches % processes:
        parser.error(f"the number of processes must divide {update_micro_batches}, the micro-batches of an update")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(rank)  # masks, dropout and LayerDrop of its own; the weights will be those of rank 0

    if args.audio is not None and not any(args.audio.rglob("*.wav")):
        parser.error(f"--audio must be a folder with wav files; got {args.audio}")
    speech = Speech(args.audio, longest=SAMPLE_RATE if args.tiny else 15 * SAMPLE_RATE)
    batches = divided(speech.samples, most=micro_batch_seconds * SAMPLE_RATE)
    held_out = padded([speech[i] for i in batches.pop(len(batches) // 2)])
    if len(batches) < update_micro_batches:
        needed = f"{update_micro_batches} micro-batches beside the held-out one"
        parser.error(f"--audio must give {needed}; got {len(batches)}")

    model = TINY.build(CLASSES) if args.tiny else hubert_pretrain_base(num_classes=CLASSES)
    objective = PretrainingObjective(model.to(device).train())
    # Without device_ids: with them, DDP takes to the GPU what should stay on the CPU. No find_unused_parameters either.
    wrapped = DistributedDataParallel(objective) if processes > 1 else objective
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-4, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, 12 * (done + 1) / args.steps))
    loader = DataLoader(
        speech,
        batch_sampler=Share(batches),
        collate_fn=Collate(objective),
        num_workers=2,
        pin_memory=device.type == "cuda",
    )
    done = epoch = 0
    while done < args.steps:
        loader.batch_sampler.set_epoch(epoch)
        epoch += 1
        for micro_batches in zip(*[iter(loader)] * (update_micro_batches // processes)):
            loss = update(wrapped, objective, optimizer, micro_batches, device)
            schedule.step()
            done += 1
            if rank == 0 and (done % log_every == 0 or done == args.steps):  # reading a result waits for the GPU
                held_out_loss = validate(objective, held_out, device)
                print(f"update {done}: loss {loss:.3f}, held-out loss {held_out_loss:.3f}", flush=True)
            if done == args.steps:
                break
    if args.out and rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.out / "model.pt")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
