"""The training loop: updates, logging, validation and checkpoints of one process among one or many.

A run is a function of its configuration and seed alone: stopped at any moment and resumed, it ends with the same
weights.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hubert_fast import GraphedStep
from hubert_fast.pretrain.checkpoint import checkpoint_path, save_checkpoint
from hubert_fast.pretrain.config import IterationConfig, ModelConfig, PretrainConfig
from hubert_fast.pretrain.distributed import Process
from hubert_fast.pretrain.finite import FiniteGuard
from hubert_fast.pretrain.interrupts import StopRequest, TrainingInterrupted
from hubert_fast.pretrain.left_out import LeftOut, write_left_out
from hubert_fast.pretrain.metrics_log import Clock, Meter, metrics_log
from hubert_fast.pretrain.micro_batches import halve_until_they_fit, run_largest
from hubert_fast.pretrain.progress import say
from hubert_fast.pretrain.random_state import (
    preserved_random_state,
    random_state,
    restore_random_state,
    seed_everything,
)
from hubert_fast.pretrain.schedule import linear_warmup_decay

if TYPE_CHECKING:
    from hubert_fast.pretrain.batches import Batch, GlobalBatches


Log = Callable[[int, Mapping[str, float]], None]
# An update of the weights on micro-batches, given the masked frames of all ranks and micro-batches.
Step = Callable[["list[Batch]", float], None]


class Trainer:
    """Takes ``iteration.optimizer.steps`` updates of ``objective.model``, logging, validating and saving below ``out``.

    ``objective`` is a `hubert_fast.PretrainingObjective` on the process's device, equal on every rank. ``description``
    is stored in each checkpoint (see `checkpoint.require_same_run`). ``halve``: micro-batches, where the largest of them
    runs out of memory before the first step (see `micro_batches.halve_until_they_fit`). ``graphs``: steps are those of a
    `hubert_fast.GraphedStep`.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: GlobalBatches,
        valid_batches: Iterable[list[Batch]] | None,
        config: PretrainConfig,
        iteration: IterationConfig,  # of config
        *,
        process: Process,
        out: Path,
        description: Mapping[str, Any],
        progress: bool,
        halve: bool = False,
        graphs: bool = False,
    ) -> None:
        self.objective = objective
        parallel = process.world_size > 1 and not graphs
        self.parallel = _data_parallel(objective, iteration.model) if parallel else objective
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        settings = iteration.optimizer
        self.optimizer = torch.optim.AdamW(  # decays every parameter, as the recipe does
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.steps = settings.steps
        self.clip_norm = settings.clip_norm
        self.scheduler = linear_warmup_decay(self.optimizer, steps=self.steps, warmup_fraction=settings.warmup_fraction)
        self.batches = batches
        self.position = batches.state_dict()
        self.valid_batches = valid_batches
        self.logging = config.logging
        self.process = process
        self.checkpoints = Path(out) / "checkpoints"
        self.out = Path(out)
        self.description = dict(description)
        self.seed = config.seed
        self.autocast = config.autocast
        self.progress = progress
        self.halve, self.graphs = halve, graphs
        self.graphed: GraphedStep | None = None
        self.reduce_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.reduce_dtype]
        self.meter = Meter(process.device)
        self.guard = FiniteGuard(process.device)
        self.clock = Clock()
        self.step = 0
        self.learning_rate = self.scheduler.get_last_lr()[0]
        self._saved_step = -1
        seed_everything(self.seed, process.rank)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the ``state`` of a checkpoint of the same run."""
        self.objective.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        for part, batches in self._parts():
            batches.left_out.load_state_dict(state["left_out"][part])
        self.position = state["batches"]
        self.step = self._saved_step = state["step"]
        self.clock = Clock(seconds=state["seconds"], audio_seconds=state["audio_seconds"])
        ranks = state["ranks"]
        if len(ranks) == self.process.world_size:
            restore_random_state(ranks[self.process.rank]["random"])
            self.meter.load_state_dict(ranks[self.process.rank]["meter"])
        else:
            seed_everything(self.seed, self.process.rank, self.step)
            warnings.warn(
                f"the checkpoint was saved by {len(ranks)} processes, this run has {self.process.world_size}: batches "
                "stay the same, but dropout is drawn anew: the weights will not be those of an uninterrupted run",
                RuntimeWarning,
                stacklevel=2,
            )

    def fit(self) -> None:
        """Train from the current step to the last.

        Raises:
            NonFiniteTrainingError: for a loss or gradient that is not finite.
            DiskFullError: when a checkpoint does not fit; the one before it survives.
            TooManyBadUtterancesError: more audio cannot be read than the settings let it go past; no checkpoint is saved.
            TrainingInterrupted: on SIGTERM or SIGINT, after saving a checkpoint.
            RuntimeError: where no micro-batch is small enough for the memory.
        """
        self._list_left_out()
        with StopRequest() as stop, self._metrics_log() as log, self._progress_bar() as bar:
            if self.halve and self.step < self.steps:
                halve_until_they_fit(self.batches, self._gradients, self.optimizer, self.process)
            elif self.graphs and self.step < self.steps:
                run_largest(self.batches, self._gradients, self.optimizer, self.process.device)
            step = self._graphed_step() if self.graphs else self._eager_step
            self.clock.restart_window()
            updates = iter(self.batches)
            while self.step < self.steps:
                update = _next_unless_stopped(updates, stop)
                failed = _failed(update)
                masked_frames, audio_seconds, failures, stopping = self.process.sum_on_host(
                    [
                        sum(int(batch.mask.sum()) for batch in update),
                        sum(batch.seconds for batch in update),
                        len(failed),
                        stop.signum > 0,
                    ]
                )
                if stopping:
                    self._interrupt(stop.signum)
                if failures:
                    self._leave_out(self.batches.left_out, failed, self.step + 1)
                self._update(step, update, masked_frames)
                self.clock.add_audio(audio_seconds)
                self.position = self.batches.state_dict()
                bar.set_postfix_str(f"{self.clock.audio_seconds_per_second():.0f} audio-seconds/s", refresh=False)
                bar.update()
                if self.step == 1 or self._due(self.logging.log_every):
                    self._log(log)
                if self.valid_batches is not None and self._due(self.logging.valid_every):
                    self._validate(log)
                if self._due(self.logging.save_every):
                    self._save()
            if self.process.sum_on_host([stop.signum > 0])[0]:
                self._interrupt(stop.signum)

    def _leave_out(self, left_out: LeftOut, failed: Mapping[str, str], step: int) -> None:
        """Take note of what failed at ``step`` on any rank, on all of them: they must leave out the same from here on."""
        of_ranks = self.process.from_main(self.process.gather(failed))
        merged = {utterance: reason for each in of_ranks for utterance, reason in each.items()}
        left_out.add(merged, step=step, quiet=not self.process.is_main)
        self._list_left_out()

    def _list_left_out(self) -> None:
        if self.process.is_main:
            write_left_out(self.out, *(batches.left_out for _, batches in self._parts()))

    def _parts(self) -> list[tuple[str, Any]]:
        """The parts of the corpus and their batches."""
        parts = [("train", self.batches), ("valid", self.valid_batches)]
        return [(name, batches) for name, batches in parts if batches is not None]

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _update(self, step: Step, update: list[Batch], masked_frames: float) -> None:
        """One optimizer step on the loss per masked frame; ``masked_frames`` are those of all ranks and micro-batches."""
        self.learning_rate = self.scheduler.get_last_lr()[0]
        step(update, masked_frames)
        self.scheduler.step()
        self.step += 1

    def _watch(self, update: list[Batch], loss: Tensor, gradient_norm: Tensor) -> None:
        """Take note of this rank's ``loss`` and of the norm of all ranks' gradients, both ``[]``."""
        self.meter.add_update(gradient_norm)
        self.guard.watch(self.step + 1, [name for batch in update for name in batch.ids], loss, gradient_norm)
        if self.process.device.type == "cpu":
            self.guard.check()

    def _eager_step(self, update: list[Batch], masked_frames: float) -> None:
        """DDP averages gradients over ranks, so the sum over ranks needs the factor ``world_size``."""
        scale = self.process.world_size / max(1.0, masked_frames)
        loss = torch.zeros((), device=self.process.device)
        for batch in update:
            with self._gradients_stay_here() if batch is not update[-1] else nullcontext():
                output = self._forward(self.parallel, batch)
                (output.loss * scale).backward()
            self.meter.add_micro_batch(output)
            loss += output.loss.detach()
        self._watch(update, loss, nn.utils.clip_grad_norm_(self.parameters, self.clip_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _graphed_step(self) -> Step:
        """Steps in graphs, for the batches as they are divided now."""
        graphed = self.graphed or self._new_graphed()
        if self.process.world_size > 1:
            graphed.join(dist.group.WORLD)
        self.batches.plan_with(graphed.planner)

        def step(update: list[Batch], masked_frames: float) -> None:
            result = graphed([batch.planned for batch in update], masked_frames=masked_frames)
            self.meter.add_micro_batch(result)
            self._watch(update, result.loss, result.gradient_norm)

        return step

    def _new_graphed(self) -> GraphedStep:
        return GraphedStep(
            self.objective,
            self.optimizer,
            clip_norm=self.clip_norm,
            capacities=self.batches.capacities(),
            autocast=torch.bfloat16 if self.autocast else None,
            reduce_dtype=self.reduce_dtype,
        )

    def _gradients(self, micro_batches: list[Batch]) -> None:
        """Add up the gradients of ``micro_batches``, of this rank alone.

        In graphs, their pool is made for the largest before others come: pieces of memory for smaller ones would not do for it.
        """
        if not self.graphs:
            for batch in micro_batches:
                self._forward(self.objective, batch).loss.backward()
            return
        self.graphed = None  # that of another division, and its memory
        if self.process.device.type == "cuda":
            torch.cuda.empty_cache()
        self.graphed = self._new_graphed()
        planned = [
            self.graphed.planner(batch.waveforms, batch.labels, batch.audio_lengths, mask=batch.mask)
            for batch in micro_batches
        ]
        self.graphed.gradients(planned, every_layer=True)

    def _forward(self, objective: nn.Module, batch: Batch) -> Any:
        device = self.process.device
        waveforms, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.waveforms, batch.labels))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            # Lengths and mask stay on the host: knowing the sizes of what it launches, it never waits for a GPU.
            return objective(waveforms, labels, batch.audio_lengths, mask=batch.mask)

    def _gradients_stay_here(self) -> AbstractContextManager[Any]:
        return self.parallel.no_sync() if self.process.world_size > 1 else nullcontext()

    def _log(self, log: Log | None) -> None:
        self.guard.check()
        values = self.meter.read(self.process)
        values |= {"lr": self.learning_rate, "x_realtime": self.clock.audio_seconds_per_second()}
        values |= {"audio_seconds": self.clock.audio_seconds, "seconds": self.clock.seconds()}
        if self.batches.left_out.bad:
            values["left_out"] = len(self.batches.left_out.bad)
        if log is not None:
            log(self.step, values)
        self.clock.restart_window()

    @torch.no_grad()
    def _validate(self, log: Log | None) -> None:
        """Loss and accuracy on the held-out utterances, with the same crops and masks every time."""
        meter, failed = Meter(self.process.device), {}
        self.objective.eval()
        with preserved_random_state():
            seed_everything(self.seed, self.process.rank)
            for update in self.valid_batches:
                failed |= _failed(update)
                for batch in update:
                    meter.add_micro_batch(self._forward(self.objective, batch))
        self.objective.train()
        if self.process.sum_on_host([len(failed)])[0]:
            self._leave_out(self.valid_batches.left_out, failed, self.step)
        means = meter.read(self.process)
        if log is not None and "loss" in means:  # nothing may be left of what is held out
            log(
                self.step,
                {f"valid_{name}": means[name] for name in ("loss", "masked_loss", "masked_accuracy") if name in means},
            )
        self.clock.restart_window()

    def _save(self) -> Path:
        """Write the checkpoint of this step, unless it exists; all ranks call it together."""
        path = checkpoint_path(self.checkpoints, self.step)
        if self._saved_step == self.step:
            return path
        self.guard.check()  # a checkpoint of broken weights would push out the good ones
        ranks = self.process.gather({"random": random_state(), "meter": self.meter.state_dict()})
        if self.process.is_main:
            state = {
                **self.description,
                "step": self.step,
                "model": self.objective.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "batches": self.position,
                "left_out": {part: batches.left_out.state_dict() for part, batches in self._parts()},
                "ranks": ranks,
                "audio_seconds": self.clock.audio_seconds,
                "seconds": self.clock.seconds(),
            }
            save_checkpoint(self.checkpoints, self.step, state, keep=self.logging.keep_checkpoints)
        self.process.barrier()
        self._saved_step = self.step
        self.clock.restart_window()
        return path

    def _interrupt(self, signum: int) -> None:
        # A rank that has had no signal itself learns of it from the others, and leaves as they do.
        interrupted = TrainingInterrupted(signum or signal.SIGTERM, self.step, self._save())
        if self.process.is_main:
            say(interrupted.message)
        raise interrupted

    def _metrics_log(self) -> AbstractContextManager[Log | None]:
        return metrics_log(self.out, step=self.step) if self.process.is_main else nullcontext()

    def _progress_bar(self) -> tqdm:
        hidden = not (self.progress and self.process.is_main)
        return tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=hidden)


def _data_parallel(objective: nn.Module, model: ModelConfig) -> DistributedDataParallel:
    return DistributedDataParallel(  # without device_ids, which would move lengths and mask to the GPU
        objective,
        # An update may leave out the parameters of a dropped layer, or the mask embedding where nothing is masked.
        find_unused_parameters=model.encoder_layer_drop > 0 or model.mask_prob == 0,
        gradient_as_bucket_view=True,
    )


def _failed(update: list[Batch]) -> dict[str, str]:
    """What could not be read of an update: ids of utterances, and the reasons."""
    return {utterance: reason for batch in update for utterance, reason in batch.failed.items()}


def _next_unless_stopped(updates: Iterator[list[Batch]], stop: StopRequest) -> list[Batch]:
    """The next update's micro-batches; none after a signal, which may also have ended the workers that read them."""
    try:
        return [] if stop.signum else next(updates)
    except (RuntimeError, OSError, EOFError):  # the last two from a worker that died while handing something over
        if stop.signum:
            return []
        raise
