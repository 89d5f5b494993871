"""Train HuBERT with Lightning, on wav files or on synthetic audio.

    python examples/train_lightning.py --steps 3 --tiny                 a CPU, in seconds
    python examples/train_lightning.py --steps 3 --tiny --devices 2     two processes, which Lightning starts
    python examples/train_lightning.py --audio DIR --out RUN            all GPUs

It needs `pip install lightning`. Data and models are those of train_graphed.py beside this file; what --audio takes and what is
predicted is told there. With --out the same command goes on from the last checkpoint. See docs/training-loops.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from train_ddp import Collate, MicroBatch, Share
from train_graphed import CLASSES, SAMPLE_RATE, TINY, Speech, divided

from hubert_fast import HuBERTPretrainModel, PretrainingLoss, PretrainingObjective, hubert_pretrain_base
from hubert_fast.models.plan import StepPlan


def mean_over_ranks(result: PretrainingLoss) -> Tensor:
    """The loss per masked frame of all ranks, for gradients that are averaged over ranks."""
    if not dist.is_initialized():
        return result.mean
    masked = result.masked_count.clone()
    dist.all_reduce(masked)
    return dist.get_world_size() * result.loss / masked.clamp(min=1)


class HuBERT(pl.LightningModule):
    """The objective; a batch is (waveforms, labels, audio_lengths, mask), as `train_ddp.Collate` makes it."""

    def __init__(self, model: HuBERTPretrainModel, steps: int) -> None:
        super().__init__()
        self.objective = PretrainingObjective(model)
        self.steps = steps

    def transfer_batch_to_device(
        self, batch: MicroBatch, device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor, StepPlan]:
        """Waveforms and the plan on the device. Labels, lengths and mask stay on the host, where they decide about shapes.

        Lightning would move them, and so would the DDP that it makes; from the device the host could read none without
        waiting, so all padding would be computed. The plan may be moved: it has the shapes already.
        """
        waveforms, labels, lengths, mask = batch
        plan = self.objective.plan(labels, lengths, samples=waveforms.shape[1], device=device, mask=mask)
        return waveforms.to(device, non_blocking=True), plan

    def on_fit_start(self) -> None:
        torch.manual_seed(self.global_rank)  # dropout, LayerDrop and masks of its own; the weights are those of rank 0

    def training_step(self, batch: tuple[Tensor, StepPlan], batch_idx: int) -> Tensor:
        waveforms, plan = batch
        result = self.objective(waveforms, plan=plan)
        self.log("loss", result.mean.detach(), batch_size=len(waveforms))
        return mean_over_ranks(result)

    def validation_step(self, batch: tuple[Tensor, StepPlan], batch_idx: int) -> None:
        waveforms, plan = batch
        self.log("held-out loss", self.objective(waveforms, plan=plan).mean, batch_size=len(waveforms), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), 5e-4, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, 12 * (done + 1) / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Print(pl.Callback):
    """Writes the losses of every so many updates. Reading one waits for the GPU."""

    def __init__(self, every: int) -> None:
        self.every, self.said = every, 0

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        self.said = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        done = trainer.global_step
        if trainer.is_global_zero and done > self.said and (done % self.every == 0 or done == trainer.max_steps):
            self.said = done
            losses = ", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items())
            print(f"update {done}: {losses}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--audio", type=Path, help="folder of wav files (default: synthetic audio)")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: none is kept)")
    parser.add_argument("--steps", type=int, default=1000, help="updates (default: 1000)")
    parser.add_argument("--tiny", action="store_true", help="a small model and short audio, for a CPU")
    parser.add_argument("--devices", type=int, help="processes (default: one for each GPU, or one)")
    args = parser.parse_args()
    longest, most, log_every = (1, 4, 1) if args.tiny else (15, 80, 100)  # seconds, seconds, updates
    on_gpu = torch.cuda.is_available()
    devices = args.devices or (torch.cuda.device_count() if on_gpu else 1)
    if args.audio is not None and not any(args.audio.rglob("*.wav")):
        parser.error(f"--audio must be a folder with wav files; got {args.audio}")
    speech = Speech(args.audio, longest * SAMPLE_RATE)
    batches = divided(speech.samples, most * SAMPLE_RATE)
    held_out = batches.pop(len(batches) // 2)
    if len(batches) < devices:
        parser.error(f"--audio must give {devices} micro-batches beside the held-out one; got {len(batches)}")

    torch.manual_seed(0)
    model = TINY.build(CLASSES) if args.tiny else hubert_pretrain_base(num_classes=CLASSES)
    module = HuBERT(model, args.steps)
    settings = {"collate_fn": Collate(module.objective), "num_workers": 2, "pin_memory": on_gpu}
    callbacks = [Print(log_every)]
    if args.out is not None:
        callbacks.append(ModelCheckpoint(args.out, save_last=True))
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",  # not ddp_find_unused_parameters_true: LayerDrop does not need it
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=10.0,
        max_steps=args.steps,
        use_distributed_sampler=False,  # `Share` divides the batches
        default_root_dir=args.out,
        callbacks=callbacks,
        enable_checkpointing=args.out is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(speech, batch_sampler=Share(batches), **settings),
        DataLoader(speech, batch_sampler=[held_out], **settings),
        ckpt_path="last" if args.out else None,
    )


if __name__ == "__main__":
    main()
