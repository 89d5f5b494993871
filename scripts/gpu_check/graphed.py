"""Graphed steps of HuBERT Base for the check's items, their batches, and a count of their captures."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

import hubert_fast
from benchmarks.batches import SAMPLE_RATE, Batch, even, make
from hubert_fast.models.optimizer_step import _can_be_captured
from scripts.gpu_check.device import DEVICE, ON_GPU
from scripts.gpu_check.models import DTYPE, NUM_CLASSES, architecture

AUTOCAST = torch.bfloat16 if DTYPE == "bfloat16" else None
CLIP_NORM = 10.0
LEARNING_RATE = 2**-11  # float32, in which a graph reads it, holds it exactly
# After so many runs even layers that are dropped half of the time have all run once, and the capacity is captured.
MOST_RUNS = 60


class CountedCapture:
    """Counts the graphs that ``made_by`` makes, the seconds that takes, and their launches."""

    def __init__(self, made_by: Any) -> None:
        self._made_by = made_by
        self.graphs, self.seconds, self.launches = 0, 0.0, 0

    def ahead(self) -> AbstractContextManager[None]:
        return self._made_by.ahead()

    def renew(self) -> None:
        self._made_by.renew()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        started = time.perf_counter()
        graph = self._made_by(work)
        self.seconds += time.perf_counter() - started
        self.graphs += 1

        def launch() -> None:
            self.launches += 1
            graph()

        return launch


class Graphed(NamedTuple):
    step: hubert_fast.GraphedStep
    capture: CountedCapture  # of forward and backward
    optimizers: CountedCapture


class Example(NamedTuple):
    """A batch, and what a step's planner made of it."""

    batch: Batch
    planned: hubert_fast.MicroBatch


def free_what_is_left() -> None:
    """Collect steps of before, which lie in cycles: PyTorch ends a process that frees a pool while something is captured."""
    gc.collect()


def make_objective(layer_drop: float) -> hubert_fast.PretrainingObjective:
    """HuBERT Base, ready to train, with the same weights every time."""
    arguments = {**architecture("base").factory_arguments(NUM_CLASSES), "encoder_layer_drop": layer_drop}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = hubert_fast.hubert_pretrain_model(**arguments)
    return hubert_fast.PretrainingObjective(model.train())


def adamw(objective: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(objective.parameters(), LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)


def make_graphed(
    objective: hubert_fast.PretrainingObjective,
    optimizer: Optional[torch.optim.Optimizer] = None,
    *,
    capacities: Optional[hubert_fast.Capacities] = None,
    most_graphs: int = 32,
) -> Graphed:
    optimizer = optimizer or adamw(objective)
    step = hubert_fast.GraphedStep(
        objective,
        optimizer,
        clip_norm=CLIP_NORM,
        capacities=capacities or capacities_of(lengths_of_batch()),
        autocast=AUTOCAST,
        most_graphs=most_graphs,
    )
    maker = made_by(step._capture)
    step._capture, optimizers = CountedCapture(maker), CountedCapture(maker)
    step._optimizer._capture = optimizers if _can_be_captured(optimizer) else None
    return Graphed(step, step._capture, optimizers)


def made_by(capture: Any) -> Any:
    """The capture: on a CPU the tests' stand-in."""
    if ON_GPU:
        return capture
    from tests.models.graph_stand_in import StandInCapture

    return StandInCapture()


def lengths_of_batch(scale: float = 1.0) -> list[int]:
    """Lengths of the utterances of a padded batch, in samples: 175 s of 11 to 14 s each."""
    count, least, most = (14, 11.0, 14.0) if ON_GPU else (3, 0.35, 0.5)
    return [round(scale * SAMPLE_RATE * (least + (most - least) * i / (count - 1))) for i in range(count)]


def even_lengths() -> list[int]:
    return even(14, 12.5) if ON_GPU else even(2, 0.5)


def capacities_of(lengths: list[int]) -> hubert_fast.Capacities:
    frames = [architecture("base").frames_of(each) for each in lengths]
    return hubert_fast.Capacities(rows=sum(frames), sequences=len(frames), max_frames=max(frames))


def make_example(step: hubert_fast.GraphedStep, lengths: list[int], seed: int) -> Example:
    return planned_example(step, pinned(make(lengths, architecture("base"), NUM_CLASSES, seed=seed)))


def planned_example(step: hubert_fast.GraphedStep, batch: Batch) -> Example:
    planned = step.planner(batch.waveforms, batch.labels, batch.lengths, mask=batch.mask)
    return Example(batch, planned.pin_memory() if ON_GPU else planned)


def pinned(batch: Batch) -> Batch:
    """The same batch, its audio and labels page-locked, as a data loader's."""
    if not ON_GPU:
        return batch
    return dataclasses.replace(batch, waveforms=batch.waveforms.pin_memory(), labels=batch.labels.pin_memory())


def of_one_capacity(step: hubert_fast.GraphedStep) -> list[Example]:
    """Two batches that one graph serves: how many frames are masked is random."""
    first = make_example(step, lengths_of_batch(), 0)
    others = (make_example(step, lengths_of_batch(), seed) for seed in range(1, 50))
    return [first, next(each for each in others if each.planned.capacity == first.planned.capacity)]


def until_captured(graphed: Graphed, examples: Sequence[Example]) -> int:
    """Run ``examples`` until their capacity is captured; returns how often they ran before."""
    graphs = graphed.capture.graphs
    for runs in range(MOST_RUNS):
        graphed.step.gradients([each.planned for each in examples])
        if graphed.capture.graphs > graphs:
            return runs
    raise RuntimeError(f"a capacity was not captured in {MOST_RUNS} runs")


def until_all_captured(graphed: Graphed, examples: Sequence[Example]) -> None:
    """Take updates until no more graphs of forward and backward are made, nor of the optimizer where all layers take part."""
    quiet = 0
    for _ in range(MOST_RUNS):
        before = graphed.capture.graphs
        for each in examples:
            graphed.step([each.planned])
        quiet = quiet + 1 if graphed.capture.graphs == before and before else 0
        if quiet == 2:
            return
    raise RuntimeError(f"capacities were still captured after {MOST_RUNS} rounds")


def in_autocast() -> torch.autocast:
    return torch.autocast(DEVICE, AUTOCAST or torch.bfloat16, enabled=AUTOCAST is not None)
