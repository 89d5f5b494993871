"""Train HuBERT in a loop of one's own with `hubert_fast.GraphedStep`, on wav files or on synthetic audio.

    python examples/train_graphed.py --steps 3 --tiny         a CPU, in seconds
    python examples/train_graphed.py --audio DIR --out RUN    a GPU; the wav files in DIR have 16 kHz, 16 bits, one channel
    torchrun --nproc-per-node 8 examples/train_graphed.py --audio DIR --out RUN

hubert_fast is installed, or PYTHONPATH names its source tree. What is predicted is the loudness of each frame, in steps: put
k-means units in its place. With --out the same command goes on from the checkpoint there. See docs/cuda-graphs.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import wave
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from hubert_fast import Capacities, GraphedStep, MicroBatchPlanner, PretrainingObjective, hubert_pretrain_base
from hubert_fast.pretrain.config import ModelConfig

CLASSES, SAMPLE_RATE = 100, 16_000
TINY = ModelConfig(
    extractor_conv_layer_config=((32, 10, 5),) + ((32, 3, 2),) * 4 + ((32, 2, 2),) * 2,
    encoder_embed_dim=64,
    encoder_num_layers=2,
    encoder_num_heads=2,
    encoder_ff_interm_features=128,
)


def frames(samples: int) -> int:
    return (samples - 400) // 320 + 1


def length_of(file: Path) -> int:
    with wave.open(str(file)) as opened:
        form = opened.getnchannels(), opened.getsampwidth(), opened.getframerate()
        if form != (1, 2, SAMPLE_RATE) or opened.getnframes() < SAMPLE_RATE // 2:
            raise ValueError(f"{file} must have (channels, bytes, Hz) of (1, 2, 16000), and half a second; got {form}")
        return opened.getnframes()


class Speech(Dataset):
    """Pairs of waveform ([samples] float) and labels ([frames] int64); ``samples`` has the length of each."""

    def __init__(self, audio: Path | None, longest: int) -> None:
        if audio is None:
            self.samples = list(range(longest // 2, longest, longest // 128))
            self.files = [None] * len(self.samples)
        else:
            self.files = sorted(audio.rglob("*.wav"))
            self.samples = [min(length_of(file), longest) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if self.files[i] is None:
            waveform = torch.randn(self.samples[i], generator=torch.Generator().manual_seed(i))
            waveform *= torch.linspace(0, 30, self.samples[i]).sin()  # louder and softer
        else:
            with wave.open(str(self.files[i])) as file:
                waveform = torch.frombuffer(bytearray(file.readframes(self.samples[i])), dtype=torch.int16) / 2**15
        energy = waveform.unfold(0, 400, 320).square().mean(1)
        return waveform, (4 * (energy + 1e-8).log() + 75).long().clamp(0, CLASSES - 1)


def divided(samples: list[int], most: int) -> list[list[int]]:
    """Micro-batches of utterances of like length: indices; each has at most ``most`` samples with its padding."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(samples)), key=samples.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * samples[i] > most:
            batches.append([])
        batches[-1].append(i)
    return batches


def padded(utterances: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Waveforms [batch, samples], labels [batch, frames], lengths [batch] in samples."""
    waveforms, labels = zip(*utterances)
    lengths = torch.tensor([len(each) for each in waveforms])
    return pad_sequence(waveforms, batch_first=True), pad_sequence(labels, batch_first=True), lengths


def planned(planner: MicroBatchPlanner, utterances: list[tuple[Tensor, Tensor]]):
    return planner(*padded(utterances))


@torch.no_grad()
def validate(objective: PretrainingObjective, batch: tuple[Tensor, Tensor, Tensor], device: torch.device) -> float:
    """Loss per masked frame. It is computed eagerly, beside the graphs."""
    waveforms, labels, lengths = batch
    objective.eval()
    with torch.autocast(device.type, torch.bfloat16):
        result = objective(waveforms.to(device), labels, lengths)
    objective.train()
    return float(result.mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--audio", type=Path, help="folder of wav files (default: synthetic audio)")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: none is kept)")
    parser.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    parser.add_argument("--tiny", action="store_true", help="a small model and short audio, for a CPU")
    args = parser.parse_args()
    micro_batch_seconds, accumulate, log_every = (4, 2, 1) if args.tiny else (80, 2, 100)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING)  # says which capacities are captured
    torch.manual_seed(rank)  # masks and dropout of its own; the weights will be those of rank 0

    if args.audio is not None and not any(args.audio.rglob("*.wav")):
        parser.error(f"--audio must be a folder with wav files; got {args.audio}")
    speech = Speech(args.audio, longest=SAMPLE_RATE if args.tiny else 15 * SAMPLE_RATE)
    batches = divided(speech.samples, most=micro_batch_seconds * SAMPLE_RATE)
    held_out = padded([speech[i] for i in batches.pop(len(batches) // 2)])
    epoch_updates = len(batches) // (processes * accumulate)
    if epoch_updates == 0:
        needed = f"{processes * accumulate} (processes x {accumulate})"
        parser.error(f"--audio must give {needed} micro-batches beside the held-out one; got {len(batches)}")

    model = TINY.build(CLASSES) if args.tiny else hubert_pretrain_base(num_classes=CLASSES)
    objective = PretrainingObjective(model.to(device).train())
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-4, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm_up = max(1, args.steps // 12)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm_up, (args.steps - done) / max(1, args.steps - warm_up))
    )
    done, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if args.out and (args.out / "checkpoint.pt").exists():
        state = torch.load(args.out / "checkpoint.pt", map_location="cpu")
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    step = GraphedStep(
        objective,
        optimizer,
        clip_norm=10.0,
        capacities=Capacities(
            rows=max(sum(frames(speech.samples[i]) for i in batch) for batch in batches),
            sequences=max(map(len, batches)),
            max_frames=frames(max(speech.samples)),
        ),
        autocast=torch.bfloat16,
        process_group=dist.group.WORLD if processes > 1 else None,
    )
    while done < args.steps:
        epoch, first = divmod(done, epoch_updates)
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
        mine = [batches[i] for i in order[rank::processes]][first * accumulate : epoch_updates * accumulate]
        loader = DataLoader(
            speech,
            batch_sampler=mine[: (args.steps - done) * accumulate],
            collate_fn=partial(planned, step.planner),  # in the workers
            num_workers=2,
            pin_memory=device.type == "cuda",
        )
        for micro_batches in zip(*[iter(loader)] * accumulate):
            result = step(micro_batches)
            schedule.step()
            done += 1
            if rank == 0 and (done % log_every == 0 or done == args.steps):  # reading a result waits for the GPU
                loss, right = result.mean, result.masked_correct / result.masked_count.clamp(min=1)
                print(f"update {done}: loss {loss:.3f}, accuracy {right:.3f}", end=", ")
                print(f"held-out loss {validate(objective, held_out, device):.3f}", flush=True)
                if args.out:
                    args.out.mkdir(parents=True, exist_ok=True)
                    state = {name: part.state_dict() for name, part in parts.items()}
                    torch.save({**state, "done": done}, args.out / "checkpoint.pt")
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
